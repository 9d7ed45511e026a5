"""What `mi-pipe export` and `mi-pipe import` do."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from flows.terminal import Screen, results_console
from mi_pipe.activations.store import ActivationStore
from mi_pipe.core.artifact import format_size
from mi_pipe.core.errors import ConfigError
from mi_pipe.core.progress import Progress
from mi_pipe.core.stage import execute
from mi_pipe.core.store import Store
from mi_pipe.export.hdf5 import export_hdf5
from mi_pipe.export.saelens import export_saelens
from mi_pipe.opening import open_artifact
from stages import import_activations
from stages.import_activations import ImportConfig, Inputs

EXPORTS: dict[str, Callable[..., Path]] = {"hdf5": export_hdf5, "saelens": export_saelens}
_out = results_console()


def export_command(artifact_id: str, to: str, out: Path, hooks: Sequence[str], store: str | None) -> None:
    """Write an activation store in another program's format."""
    acts = open_artifact(artifact_id, store)
    if not isinstance(acts, ActivationStore):
        raise ConfigError(f"{acts.id} holds no activations; export takes a harvest or an import.")
    with Screen() as screen:
        screen.begin(f"export {acts.id}")
        path = EXPORTS[to](acts, out, list(hooks) or None, Progress(screen.tick))
    size = sum(file.stat().st_size for file in [path, *path.rglob("*")] if file.is_file())
    _out.print(f"{acts.id} is in {path} ({to}, {format_size(size)})", markup=False)


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


def _hook_and_array(word: str) -> tuple[str, str]:
    hook, _, array = word.partition("=")
    return hook, array
