"""A recipe in one Python call, `flows.run`, for notebooks and scripts: what `mi-pipe run --no-prefect` does."""

import contextlib
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from os import PathLike, fspath
from typing import Any

from flows.diagram import Step
from flows.pools import DaskPool, cluster
from flows.preflight import Prepared, prepare
from flows.runner import StepReport, run_diagram, run_step
from flows.terminal import Screen
from mi_pipe.core.artifact import Artifact
from mi_pipe.core.errors import StageError
from mi_pipe.core.progress import Progress
from mi_pipe.opening import open_artifact


def run(
    recipe: str | Mapping[str, Any],
    overrides: Sequence[str] = (),
    store: str | PathLike[str] | None = None,
    workers: int = 1,
    dask: str | None = None,
) -> dict[str, Artifact]:
    """Make everything that a recipe asks for and the store does not hold yet; return it, opened, by the steps' names.

    `run({"model": {"name": "gpt2"}, "tasks": {"ioi": {"family": "ioi"}}, "patch": {}})["patch.ioi"]` is a sweep.

    `recipe` is a path, the name of a recipe that ships, or the sections themselves; `overrides` are `key.path=value`;
    `store` is a folder (default: the recipe's, MI_PIPE_STORE, or data/store). `workers` processes, or those of the Dask
    scheduler at `dask`, share what can be shared. A call that was interrupted is continued by the same call. Raises
    ConfigError and the other errors of `prepare` before any work; StageError for steps that failed, after all those
    that do not need them.
    """
    ready = prepare(recipe, overrides, None if store is None else fspath(store))
    Screen().given(ready.given)
    reports = run_directly(ready, workers=workers, dask=dask)
    if failed := [f"{report.step.label}: {report.message}" for report in reports if report.outcome == "Failed"]:
        raise StageError(f"{len(failed)} of {len(reports)} steps failed. {' '.join(failed)}")
    return {step.label: open_artifact(ready.store.folder(step.id)) for step in ready.steps}


def run_directly(ready: Prepared, wait: bool = False, workers: int = 1, dask: str | None = None) -> list[StepReport]:
    """Run the steps in this process, without Prefect, and return how each ended."""
    with cluster(workers, dask) as address, Screen() as screen, _pool(address) as pool:

        def run_one(step: Step) -> StepReport:
            screen.begin(step.label)
            return run_step(step, ready.store, Progress(screen.tick), wait, pool)

        return run_diagram(ready.steps, run_one, screen.report)


def _pool(address: str | None) -> AbstractContextManager[DaskPool | None]:
    return contextlib.closing(DaskPool(address)) if address else contextlib.nullcontext()
