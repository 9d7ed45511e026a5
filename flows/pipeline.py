"""The pipeline as one Prefect flow: the steps of `flows.diagram`, each a task, driven by a recipe.

Deployments (prefect.yaml) start `pipeline`; the command line runs the same flow in its own process.
"""

from flows.quiet import quiet

quiet()

from collections.abc import Callable  # noqa: E402
from typing import Any  # noqa: E402

from prefect import Flow  # noqa: E402 (Prefect reads its settings when it is imported)
from prefect.client.schemas.objects import State  # noqa: E402
from prefect.states import Failed  # noqa: E402

from flows.pools import cluster  # noqa: E402
from flows.preflight import prepare  # noqa: E402
from flows.recipe import DEFAULT_RECIPE  # noqa: E402
from flows.runner import StepReport, run_diagram  # noqa: E402
from flows.tasks import run_as_task  # noqa: E402
from flows.terminal import Screen  # noqa: E402


def make_flow(on_end: Callable[[list[StepReport]], Any]) -> Flow[Any, Any]:
    """Return the pipeline's flow, which tells `on_end` how each step ended."""

    def pipeline(
        recipe: str = DEFAULT_RECIPE,
        overrides: list[str] | None = None,
        store: str | None = None,
        wait: bool = False,
        workers: int = 1,
        dask: str | None = None,
    ) -> State[None] | None:
        """Make everything that a recipe asks for and the store does not hold yet.

        `recipe` is a path or the name of a recipe that ships, `overrides` are `key.path=value`, `store` is a
        folder. What can be shared is shared by `workers` processes, or by those of the Dask scheduler at the address
        `dask`. If a step fails, the flow ends as Failed after every step that does not need it has been made.
        """
        ready = prepare(recipe, overrides or [], store)
        with cluster(workers, dask) as address, Screen() as screen:
            reports = run_diagram(
                ready.steps, lambda step: run_as_task(step, ready.store, screen, wait, address), screen.report
            )
        on_end(reports)
        failed = [report for report in reports if report.outcome == "Failed"]
        if not failed:
            return None
        told = "; ".join(f"{report.step.label}: {report.message}" for report in failed)
        return Failed(message=f"{len(failed)} of {len(reports)} steps failed. {told}")

    return Flow(pipeline, name="mi-pipe", flow_run_name="{recipe}", persist_result=False)


pipeline = make_flow(lambda _reports: None)


def run_in_flow(
    recipe: str, overrides: list[str], store: str | None, wait: bool, workers: int = 1, dask: str | None = None
) -> list[StepReport]:
    """Run a recipe in this process as a Prefect flow and return how each step ended."""
    collected: list[StepReport] = []
    state: Any = make_flow(collected.extend)(recipe, overrides, store, wait, workers, dask, return_state=True)
    if not collected:
        state.result(raise_on_failure=True)
    return collected
