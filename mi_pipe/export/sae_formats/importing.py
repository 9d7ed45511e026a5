"""One SAE of a folder that SAELens or sparsify wrote, whichever it is, with what the folder says of it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mi_pipe.core.errors import ArtifactDamagedError
from mi_pipe.export.sae_formats.folder import SAEFolder
from mi_pipe.export.sae_formats.from_saelens import check_saelens, read_saelens
from mi_pipe.export.sae_formats.from_sparsify import check_sparsify, read_sparsify
from mi_pipe.export.sae_formats.packed import PROBE_FILE
from mi_pipe.saes.sae import SAE
from mi_pipe.saes.sites import Sites
from mi_pipe.saes.storage import probe_agrees

_CHECKS = {"saelens": check_saelens, "sparsify": check_sparsify}
_READERS = {"saelens": read_saelens, "sparsify": read_sparsify}


@dataclass(frozen=True)
class ImportedSAE:
    """An SAE and where it comes from."""

    sae: SAE
    kind: str
    """The program whose folder it is."""
    config: dict[str, Any]
    """The folder's whole config, as a note."""


def check_sae_folder(path: Path, hooks: str = "") -> Sites:
    """Return which hook points a folder's SAE reads and writes; raises as `read_sae_folder`, but reads no weights."""
    folder = SAEFolder.at(path)
    return _CHECKS[folder.kind](folder, hooks)[1]


def read_sae_folder(path: Path, hooks: str = "", model: str = "") -> ImportedSAE:
    """Read an SAE on raw activations from a folder.

    `hooks` (`hook`, or `input -> output` for a transcoder) and `model` overrule what the folder says. Raises
    ConfigError if it is no such folder, or holds what cannot be an SAE here; ArtifactDamagedError if files cannot be
    read, or if a folder that mi_pipe exported no longer does what it did.
    """
    folder = SAEFolder.at(path)
    sae = _READERS[folder.kind](folder, hooks, model)
    probe = _probe(path)
    if probe is not None and not probe_agrees(sae, probe):
        raise ArtifactDamagedError(f"{path} does not give the outputs that are in its {PROBE_FILE}: it was changed.")
    return ImportedSAE(sae, folder.kind, folder.read_json())


def _probe(path: Path) -> dict[str, Tensor] | None:
    """Return the probe that an export of ours has beside the weights."""
    if not (path / PROBE_FILE).is_file():
        return None
    try:
        found = load_file(path / PROBE_FILE)
    except (OSError, SafetensorError) as error:
        raise ArtifactDamagedError(f"{path / PROBE_FILE} cannot be read as safetensors.") from error
    return found if set(found) == {"input", "output"} else None
