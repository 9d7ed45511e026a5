"""What `mi-pipe export`, `mi-pipe import` and `mi-pipe import-saes` do."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from flows.given import given_activations, known_model, known_prompts
from flows.terminal import Screen, results_console
from mi_pipe.activations.store import ActivationStore
from mi_pipe.core.artifact import Artifact, format_size
from mi_pipe.core.errors import ConfigError
from mi_pipe.core.progress import Progress
from mi_pipe.core.stage import execute
from mi_pipe.core.store import Store
from mi_pipe.export.hdf5 import export_hdf5
from mi_pipe.export.sae_formats.exporting import SAE_FORMATS, export_saes
from mi_pipe.export.sae_formats.origin import origin_of
from mi_pipe.export.saelens import export_saelens
from mi_pipe.opening import open_artifact
from mi_pipe.saes.sae_set import SAESet
from stages import import_activations, import_saes
from stages.import_activations import ImportConfig, Inputs
from stages.import_saes import ImportSAEsConfig

EXPORTS: dict[str, Callable[..., Path]] = {"hdf5": export_hdf5, "saelens": export_saelens}
_out = results_console()


def export_command(
    artifact_id: str, to: str, out: Path, hooks: Sequence[str], names: Sequence[str], store: str | None
) -> None:
    """Write an activation store, or SAEs of a set, in another program's format."""
    found = open_artifact(artifact_id, store)
    _check_export(found, to, hooks, names)
    with Screen() as screen:
        screen.begin(f"export {found.id}")
        progress = Progress(screen.tick)
        if isinstance(found, SAESet):
            path = export_saes(found, to, out, list(names) or None, origin_of(found, Store(store)), progress)
        else:
            path = EXPORTS[to](found, out, list(hooks) or None, progress)
    size = sum(file.stat().st_size for file in [path, *path.rglob("*")] if file.is_file())
    _out.print(f"{found.id} is in {path} ({to}, {format_size(size)})", markup=False)


def _check_export(found: Artifact, to: str, hooks: Sequence[str], names: Sequence[str]) -> None:
    """Raise ConfigError unless the format and the options are for what is to be exported."""
    if isinstance(found, SAESet):
        formats, what, option, other = [*SAE_FORMATS], "SAEs", "--sae", hooks
    elif isinstance(found, ActivationStore):
        formats, what, option, other = [*EXPORTS], "activations", "--hook", names
    else:
        raise ConfigError(f"{found.id} holds no activations and no SAEs, which are what can be exported.")
    if to not in formats:
        raise ConfigError(f"{found.id} holds {what}, which go --to {' or '.join(formats)}, not to {to}.")
    if other:
        raise ConfigError(f"{found.id} holds {what}: some of them are named with {option}.")


def import_command(
    files: Sequence[Path], hooks: Sequence[str], tokens: Path | None, store: str | None, fields: dict[str, Any]
) -> None:
    """Make an activation store of files that other programs wrote."""
    named = dict(_hook_and_array(hook) for hook in hooks)
    if len(named) < len(hooks):
        raise ConfigError("A hook point is named by two --hook options; its parts are found in all files by one.")
    config = ImportConfig(files=tuple(files), tokens=tokens, hooks=named, **fields)
    with Screen() as screen:
        screen.begin("import")
        result = execute(import_activations.STAGE, config, Inputs(), Store(store), Progress(screen.tick), "import")
    figures = result.artifact.summary
    rows = f"{figures['n_rows']:,} rows of {figures['n_prompts']:,} prompts, {figures['store_dtype']}"
    _out.print(f"{result.outcome} in {result.seconds:.1f} s: {rows}", markup=False)
    _out.print(result.artifact.id, markup=False)


def import_saes_command(
    folders: Sequence[Path], hooks: str, model: str, activations: str | None, store: str | None, fields: dict[str, Any]
) -> None:
    """Make a set of SAEs of folders that other programs wrote."""
    config = ImportSAEsConfig(folders=tuple(folders), hooks=hooks, model=model, **fields)
    place = Store(store)
    inputs = import_saes.Inputs()
    if activations is not None:
        acts = given_activations(activations, place, None)
        inputs = import_saes.Inputs(known_model(acts, place), known_prompts(acts, place), acts)
    with Screen() as screen:
        screen.begin("import")
        result = execute(import_saes.STAGE, config, inputs, place, Progress(screen.tick), import_saes.STAGE.name)
    saes = SAESet(result.artifact.path)
    _out.print(f"{result.outcome} in {result.seconds:.1f} s: {', '.join(map(_figures, _rows(saes)))}", markup=False)
    _out.print(saes.id, markup=False)


def _rows(saes: SAESet) -> list[dict[str, Any]]:
    return [{str(key): value for key, value in row.items()} for row in saes.evaluation.to_dict("records")]


def _figures(row: dict[str, Any]) -> str:
    measured = "" if pd.isna(row["fvu"]) else f" (FVU {row['fvu']:.3f}, L0 {row['l0']:.1f})"
    return f"{row['sae']}{measured}"


def _hook_and_array(word: str) -> tuple[str, str]:
    hook, _, array = word.partition("=")
    return hook, array
