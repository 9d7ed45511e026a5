"""Running a diagram: each step once its inputs are there; a failed step stops those that need it, no others."""

import logging
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from flows.diagram import Step
from mi_pipe.core.errors import MiPipeError
from mi_pipe.core.pool import Pool
from mi_pipe.core.progress import Progress
from mi_pipe.core.stage import Result, execute
from mi_pipe.core.store import Store
from mi_pipe.opening import open_artifact

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepReport:
    """How one step ended."""

    step: Step
    outcome: Literal["Cached", "Resumed", "Completed", "Failed", "Skipped"]
    seconds: float = 0.0
    message: str = ""
    result: Result | None = field(default=None, repr=False)

    @property
    def is_done(self) -> bool:
        """Say whether the step's artifact exists."""
        return self.result is not None


RunStep = Callable[[Step], StepReport]


def run_step(step: Step, store: Store, progress: Progress, wait: bool = False, pool: Pool | None = None) -> StepReport:
    """Make one step's artifact unless it exists; errors become a report, interruptions do not."""
    try:
        inputs = step.stage.inputs(**{role: _open(source, store) for role, source in step.inputs.items()})
        result = execute(step.stage, step.config, inputs, store, progress, step.label, wait, pool)
    except MiPipeError as error:
        _log.error("%s failed: %s", step.label, error)
        return StepReport(step, "Failed", message=str(error))
    except Exception as error:
        _log.error("%s failed\n%s", step.label, traceback.format_exc())
        return StepReport(step, "Failed", message=f"{type(error).__name__}: {error} (the log has the traceback)")
    return StepReport(step, result.outcome, result.seconds, result=result)


def run_diagram(steps: list[Step], run_one: RunStep, on_report: Callable[[StepReport], Any]) -> list[StepReport]:
    """Run the steps in order through `run_one` and tell `on_report` of each; steps whose inputs failed are skipped."""
    reports: dict[int, StepReport] = {}
    for step in steps:
        missing = [source.label for source in step.upstream if not reports[id(source)].is_done]
        if missing and step.needs_all_inputs:
            report = StepReport(step, "Skipped", message=f"needs {', '.join(missing)}")
        else:
            report = run_one(_only_existing(step, reports) if missing else step)
        reports[id(step)] = report
        on_report(report)
    return list(reports.values())


def _only_existing(step: Step, reports: dict[int, StepReport]) -> Step:
    inputs = {
        role: [item for item in source if not isinstance(item, Step) or reports[id(item)].is_done]
        if isinstance(source, list)
        else source
        for role, source in step.inputs.items()
    }
    return replace(step, inputs=inputs)


def _open(source: Any, store: Store) -> Any:
    if isinstance(source, list):
        return [_open(item, store) for item in source]
    return open_artifact(store.folder(source.id)) if isinstance(source, Step) else source
