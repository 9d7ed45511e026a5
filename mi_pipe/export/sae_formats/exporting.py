"""Trained SAEs as folders that other programs load: `<out>/<name of the SAE>/`, all of them or none.

Weights take raw activations: centring and scaling of the training are folded in already. What cannot be written in the
format is refused before anything is written, in one sentence that says what can be.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mi_pipe.core.progress import Progress
from mi_pipe.export.sae_formats import to_dictionary_learning, to_saelens, to_sparsify
from mi_pipe.export.sae_formats.origin import Origin
from mi_pipe.export.sae_formats.packed import Form, Packed
from mi_pipe.export.target import new_target
from mi_pipe.saes.sae import SAE
from mi_pipe.saes.sae_set import PROBE_FILE, WEIGHTS_FILE, SAESet
from mi_pipe.saes.sites import Sites


@dataclass(frozen=True)
class SAEFormat:
    """How one program's folder is written."""

    holds: Callable[[Form], bool]
    held: str
    """What it can hold, for people."""
    pack: Callable[[SAE, Origin], Packed]


SAE_FORMATS = {
    "saelens": SAEFormat(to_saelens.holds, to_saelens.HOLDS, to_saelens.pack),
    "dictionary_learning": SAEFormat(
        to_dictionary_learning.holds, to_dictionary_learning.HOLDS, to_dictionary_learning.pack
    ),
    "sparsify": SAEFormat(to_sparsify.holds, to_sparsify.HOLDS, to_sparsify.pack),
}


def export_saes(
    saes: SAESet,
    to: str,
    path: Path,
    names: Sequence[str] | None = None,
    origin: Origin | None = None,
    progress: Progress | None = None,
) -> Path:
    """Write SAEs of a set (all, or those named) to the new folder `path`, one folder an SAE; return `path`.

    `to` is a key of `SAE_FORMATS`; `origin` what to note of model and prompts (`origin_of`). Raises ConfigError if
    `path` exists or an SAE cannot be expressed, ArtifactNotFoundError for an unknown name, DiskSpaceError,
    ArtifactDamagedError.
    """
    form = SAE_FORMATS[to]
    chosen = list(dict.fromkeys(saes.names if names is None else names))
    for name in chosen:
        found = _form(saes, name)
        found.check(form.holds(found), name, form.held)
    known = origin or Origin(saes.id, saes.digest)
    reported = progress or Progress()
    probes = saes.read_tensors(PROBE_FILE)
    size = sum(saes.manifest.files[f"saes/{name}/{WEIGHTS_FILE}"].size_bytes for name in chosen)
    with new_target(path, size) as temp:
        temp.mkdir()
        for i, name in enumerate(chosen):
            reported.update(i, len(chosen), "SAEs", name)
            probe = {part: probes[f"{name}.{part}"] for part in ("input", "output")}
            form.pack(saes[name], known).write(temp / name, probe)
    return path


def _form(saes: SAESet, name: str) -> Form:
    """Return what the config says of an SAE; a skip connection is seen only with the weights."""
    config = saes.config_of(name)
    return Form(config["inference"]["rule"], Sites(**{key: tuple(value) for key, value in config["sites"].items()}))
