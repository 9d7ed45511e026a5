"""A folder in which another program saved an SAE: found by its files, read without unpickling, held to its config.

Everything that is wrong with it is one sentence that names the folder.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from mi_pipe.core.errors import ArtifactDamagedError, ConfigError
from mi_pipe.export.sae_formats import to_saelens, to_sparsify

SAEFolderKind = Literal["saelens", "sparsify"]
CONFIG_FILE = "cfg.json"
WEIGHTS_FILES: dict[SAEFolderKind, str] = {"saelens": to_saelens.WEIGHTS_FILE, "sparsify": to_sparsify.WEIGHTS_FILE}
_PICKLES = ("*.pt", "*.pth", "*.bin", "*.pkl", "*.npz")
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class ForeignConfig(BaseModel):
    """Base of what is read of another program's config; keys that mean nothing here are left."""

    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)


FoundConfig = TypeVar("FoundConfig", bound=ForeignConfig)


@dataclass(frozen=True)
class SAEFolder:
    """One folder, not read yet."""

    path: Path
    kind: SAEFolderKind

    @classmethod
    def at(cls, path: Path) -> "SAEFolder":
        """Find which program's folder it is; raises ConfigError if it is none that can be read."""
        if not path.is_dir():
            raise ConfigError(f"{path} is no folder. Name the folder that holds {CONFIG_FILE} and the weights.")
        kinds: list[SAEFolderKind] = [kind for kind, name in WEIGHTS_FILES.items() if (path / name).is_file()]
        if len(kinds) != 1 or not (path / CONFIG_FILE).is_file():
            raise ConfigError(_unknown(path))
        return cls(path, kinds[0])

    @property
    def config_path(self) -> Path:
        """Its cfg.json."""
        return self.path / CONFIG_FILE

    @property
    def weights_path(self) -> Path:
        """Its safetensors file."""
        return self.path / WEIGHTS_FILES[self.kind]

    def read_json(self) -> dict[str, Any]:
        """Return what cfg.json holds; raises ArtifactDamagedError if it is no JSON object."""
        try:
            content = json.loads(self.config_path.read_bytes())
        except (OSError, ValueError) as error:
            raise ArtifactDamagedError(f"{self.config_path} cannot be read as JSON.") from error
        if not isinstance(content, dict):
            raise ArtifactDamagedError(f"{self.config_path} holds no JSON object.")
        return content

    def parse(self, kind: type[FoundConfig], content: Mapping[str, Any]) -> FoundConfig:
        """Return the config as `kind`; raises ConfigError naming the first key that is missing or wrong."""
        try:
            return kind.model_validate(dict(content))
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"]))
            raise ConfigError(f"{self.config_path}: {key}: {first['msg']}.") from error

    def read_tensors(self) -> dict[str, Tensor]:
        """Return the weights in float32; raises ArtifactDamagedError if unreadable, ConfigError if not finite."""
        try:
            found = load_file(self.weights_path)
        except (OSError, SafetensorError) as error:
            raise ArtifactDamagedError(f"{self.weights_path} cannot be read as safetensors.") from error
        for name, value in found.items():
            if value.dtype not in _FLOATS or not bool(torch.isfinite(value).all()):
                raise ConfigError(f"{self.weights_path}: {name} holds something that is no finite number.")
        return {name: value.to(torch.float32) for name, value in found.items()}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the tensors' shapes without reading them; raises ArtifactDamagedError if they are unreadable."""
        try:
            with safe_open(self.weights_path, framework="pt") as file:
                return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise ArtifactDamagedError(f"{self.weights_path} cannot be read as safetensors.") from error

    def check_shapes(self, expected: Mapping[str, tuple[int, ...]], what: str, ignored: str = "") -> None:
        """Raise ConfigError unless the tensors, but for `ignored`, are just those expected, in their shapes."""
        found = {name: shape for name, shape in self.shapes().items() if name != ignored}
        missing = [name for name in expected if name not in found]
        extra = [name for name in found if name not in expected]
        if missing or extra:
            told = [f"lacks {', '.join(missing)}"] * bool(missing) + [f"has {', '.join(extra)}"] * bool(extra)
            raise ConfigError(
                f"{self.weights_path} {' and '.join(told)}, but a {what} has {', '.join(expected)}: "
                "its config and its weights are not of the same SAE."
            )
        for name, shape in expected.items():
            if found[name] != shape:
                raise ConfigError(
                    f"{self.weights_path}: {name} has shape {found[name]}, and by its config a {what} has {shape}."
                )


def _unknown(path: Path) -> str:
    files = " or ".join(WEIGHTS_FILES.values())
    pickles = sorted(file.name for pattern in _PICKLES for file in path.glob(pattern))
    if pickles:
        return (
            f"{path} holds {pickles[0]}, which is not read, because unpickling runs code. Load the SAE where it was "
            "made and save it with SAELens (save_model)."
        )
    inner = sorted(folder.name for folder in path.iterdir() if (folder / CONFIG_FILE).is_file())
    if inner:
        return f"{path} holds {len(inner)} folders of SAEs and is none itself: name them, such as {path / inner[0]}."
    return f"{path} is no folder of an SAE that can be read: it needs {CONFIG_FILE} and one of {files}."
