"""A step as a Prefect task: its state is Cached, Resumed, Completed or Failed; its figures are a table artifact.

Prefect's own caching and persistence are off: mi_pipe's manifests decide what is done (a Prefect cache proves
only that a result file exists), and results stay in the store, never in Prefect.
"""

import contextlib
import time
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from prefect import Task
from prefect.artifacts import create_progress_artifact, create_table_artifact, update_progress_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed

from flows.diagram import Step
from flows.pools import PrefectPool
from flows.runner import StepReport, run_step
from flows.terminal import Screen
from mi_pipe.core.progress import Progress, Tick
from mi_pipe.core.store import Store

_PROGRESS_EVERY_S = 5.0


@dataclass(frozen=True)
class _Job:
    """What the task that runs now is to do. Kept beside the task, since Prefect pickles a task to run its shares."""

    step: Step
    store: Store
    screen: Screen
    wait: bool
    address: str | None
    reports: list[StepReport] = field(default_factory=list)


_job: ContextVar[_Job] = ContextVar("job")


def run_as_task(step: Step, store: Store, screen: Screen, wait: bool, address: str | None = None) -> StepReport:
    """Run a step as a Prefect task and return how it ended; `address` is that of the flow's Dask scheduler, if any."""
    job = _Job(step, store, screen, wait, address)
    screen.begin(step.label)
    runner = Task(_body, name=step.stage.name, task_run_name=step.label, cache_policy=NO_CACHE, persist_result=False)
    token = _job.set(job)
    try:
        runner(step.label, return_state=True)
    finally:
        _job.reset(token)
    return job.reports[-1]


def _body(label: str) -> State[None]:
    job = _job.get()
    pool = PrefectPool(job.address, label) if job.address else None
    with contextlib.closing(pool) if pool else contextlib.nullcontext():
        report = run_step(job.step, job.store, Progress(_Both(job.screen, label)), job.wait, pool)
    job.reports.append(report)
    _publish_figures(report)
    if report.result is None:
        return Failed(message=report.message)
    return Completed(name=report.outcome, message=f"{report.result.artifact.id} in {report.seconds:.1f} s")


class _Both:
    """Passes progress to the terminal and, less often, to a Prefect progress artifact."""

    def __init__(self, screen: Screen, label: str) -> None:
        self._screen = screen
        self._label = label
        self._artifact: Any = None
        self._last = time.monotonic()

    def __call__(self, tick: Tick) -> None:
        self._screen.tick(tick)
        if time.monotonic() - self._last < _PROGRESS_EVERY_S or not tick.total:
            return
        self._last = time.monotonic()
        share = min(100.0, 100.0 * tick.done / tick.total)
        if self._artifact is None:
            self._artifact = create_progress_artifact(share, key=_key(self._label, "progress"))
        else:
            update_progress_artifact(self._artifact, progress=share)


def _publish_figures(report: StepReport) -> None:
    figures = report.result.artifact.summary if report.result else {"error": report.message}
    table: list[Any] = [{"figure": name, "value": str(value)} for name, value in figures.items()]
    create_table_artifact(
        table=table or [{"figure": "outcome", "value": report.outcome}],
        key=_key(report.step.label),
        description=f"{report.step.label}: {report.outcome} in {report.seconds:.1f} s",
    )


def _key(label: str, suffix: str = "figures") -> str:
    """Prefect's artifact keys are lower-case letters, digits and dashes."""
    return "".join(char if char.isalnum() else "-" for char in f"{label}-{suffix}".lower())
