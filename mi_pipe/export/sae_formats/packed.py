"""What an SAE is in another program's format, before it is written: a JSON config and named tensors.

Beside the program's two files lies `probe.safetensors`: a few raw activations (`input`) and what the SAE makes of them
(`output`), by which any reader can check that it reads the SAE as it was meant.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from mi_pipe.core.atomic import json_bytes
from mi_pipe.core.errors import ConfigError
from mi_pipe.saes.inference import RuleKind
from mi_pipe.saes.sae import SAE
from mi_pipe.saes.sites import Sites

PROBE_FILE = "probe.safetensors"
_PICKLED = ".pt"


@dataclass(frozen=True)
class Packed:
    """One SAE as a folder of two files."""

    config_file: str
    config: dict[str, Any]
    weights_file: str
    tensors: dict[str, Tensor]

    def write(self, folder: Path, probe: dict[str, Tensor]) -> None:
        """Write the folder, which must not be there."""
        folder.mkdir()
        tensors = {name: value.detach().cpu().contiguous() for name, value in self.tensors.items()}
        if self.weights_file.endswith(_PICKLED):
            torch.save(tensors, folder / self.weights_file)
        else:
            save_file(tensors, folder / self.weights_file)
        save_file({name: value.contiguous() for name, value in probe.items()}, folder / PROBE_FILE)
        (folder / self.config_file).write_bytes(json_bytes(self.config))


@dataclass(frozen=True)
class Form:
    """What decides whether a format can hold an SAE."""

    rule: RuleKind
    sites: Sites
    has_skip: bool = False

    @classmethod
    def of(cls, sae: SAE) -> "Form":
        """Return the form of an SAE."""
        return cls(sae.rule.kind, sae.sites, sae.W_skip is not None)

    @property
    def is_single(self) -> bool:
        """Whether it reads one hook point and writes one."""
        return len(self.sites.inputs) == len(self.sites.outputs) == 1

    @property
    def kind(self) -> str:
        """sae, transcoder or crosscoder."""
        return self.sites.kind

    def check(self, is_held: bool, name: str, format_holds: str) -> None:
        """Raise ConfigError, saying what the format can hold, unless it holds this."""
        if not is_held:
            raise ConfigError(f"{name} is {self} and cannot be written so: {format_holds}.")

    def __str__(self) -> str:
        """Say what it is, in a few words."""
        if not self.is_single:
            n_hooks = len(self.sites.hooks)
            return f"a {'crosscoder' if self.kind == 'crosscoder' else 'transcoder'} over {n_hooks} hook points"
        skip = " with a skip connection" if self.has_skip else ""
        what = "an SAE" if self.kind == "sae" else "a transcoder"
        return f"{what}{skip} whose rule is {self.rule}"
