"""From what a user calls a model to a handle with a content identity, without loading any weights.

A name is, in this order: a pulled model (`smollm2-135m`), a local folder in HuggingFace layout, a `.gguf`
file, or a name on the HuggingFace hub (served from its cache when offline).
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mi_pipe.core.atomic import write_json
from mi_pipe.core.canonical import content_hash, file_sha256
from mi_pipe.core.errors import ModelError, near_names
from mi_pipe.core.manifest import Scalar
from mi_pipe.core.store import Store
from mi_pipe.models.device import DType
from mi_pipe.models.pulled import PULLABLE

_CONTENT_PATTERNS = ("config.json", "*.safetensors", "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json")
_ID_DIGITS = 16


@dataclass(frozen=True)
class ModelHandle:
    """A model that is known by content and can be loaded; an `Identified` input of stages."""

    name: str
    kind: Literal["folder", "gguf", "hub"]
    location: str
    """Folder, file or hub name."""
    digest: str
    dtype: DType = "float32"
    device: str = "auto"
    revision: str | None = None
    trust_remote_code: bool = False

    @property
    def id(self) -> str:
        """`model-<hex>`: the same content has the same id wherever it lies."""
        return f"model-{self.digest[:_ID_DIGITS]}"

    @property
    def source(self) -> dict[str, Scalar]:
        """Arguments of `resolve_model` that find it again, noted in the manifests of what is made from it."""
        return {
            "name": self.name if self.kind == "hub" or self.name in PULLABLE else self.location,
            "dtype": self.dtype,
            "revision": self.revision,
            "trust_remote_code": self.trust_remote_code,
        }


def resolve_model(
    name: str,
    store: Store,
    dtype: DType = "float32",
    device: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> ModelHandle:
    """Find the model that `name` means; raises ModelError if there is none, or it has no weights."""
    kind, location, content = _locate(name, store, revision)
    digest = content_hash({"content": content, "dtype": dtype, "trust_remote_code": trust_remote_code})
    commit = content.get("commit", revision)
    return ModelHandle(name, kind, location, digest, dtype, device, commit, trust_remote_code)


def _locate(name: str, store: Store, revision: str | None) -> tuple[Any, str, dict[str, str]]:
    path = Path(name).expanduser()
    if name in PULLABLE:
        folder = store.models / name
        if not (folder / "config.json").exists():
            raise ModelError(f"Model {name!r} is not in the store yet. Run `mi-pipe models pull {name}` first.")
        return "folder", str(folder), _folder_content(folder, store)
    if path.is_dir():
        return "folder", str(path.absolute()), _folder_content(path.absolute(), store)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"The GGUF file {name} does not exist.")
        return "gguf", str(path.absolute()), {path.name: _fingerprint(path.absolute(), store)}
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ModelError(f"The model folder {name} does not exist.")
    return "hub", name, _hub_content(name, revision)


def _folder_content(folder: Path, store: Store) -> dict[str, str]:
    if not (folder / "config.json").exists():
        raise ModelError(f"The model folder {folder} has no config.json; it is not in HuggingFace's layout.")
    if not any(folder.glob("*.safetensors")):
        pickled = any(folder.glob("*.bin")) or any(folder.glob("*.pt"))
        hint = " Pickled weights are never loaded: save them as safetensors." if pickled else ""
        raise ModelError(f"The model folder {folder} has no weights (*.safetensors).{hint}")
    files = sorted({path for pattern in _CONTENT_PATTERNS for path in folder.glob(pattern)})
    return {path.name: _fingerprint(path, store) for path in files}


def _hub_content(name: str, revision: str | None) -> dict[str, str]:
    """Return the commit that the hub, or its local cache, has for a name."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        config = hf_hub_download(name, "config.json", revision=revision)
    except HFValidationError as error:
        raise ModelError(f"{name!r} is neither a model folder nor a valid hub name.") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        near = near_names(name, PULLABLE)
        raise ModelError(
            f"Model {name!r} is no local folder and cannot be had from the HuggingFace hub "
            f"({type(error).__name__}).{near} Models that need no hub: {', '.join(PULLABLE)}."
        ) from error
    return {"hub": name, "commit": Path(config).parent.name}


def _fingerprint(path: Path, store: Store) -> str:
    """Return a file's SHA-256, remembered in the store by (path, size, time) so that it is read once."""
    memory = store.root / ".fingerprints.json"
    stat = path.stat()
    key = content_hash([os.fspath(path), stat.st_size, stat.st_mtime_ns])
    known = _read_memory(memory)
    if key not in known:
        known = {**_read_memory(memory), key: file_sha256(path)}
        write_json(memory, known)
    return known[key]


def _read_memory(path: Path) -> dict[str, str]:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
