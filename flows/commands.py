"""What the commands of flows.cli do; imported when a command runs."""

import json
import logging
import os
import shlex
import signal
import sys
import time
from typing import Any, NoReturn

from flows.quiet import quiet

quiet()

import yaml  # noqa: E402
from rich.markup import escape  # noqa: E402
from rich.table import Table  # noqa: E402

from flows.call import run_directly  # noqa: E402
from flows.diagram import Step  # noqa: E402
from flows.forecast import measured_speed  # noqa: E402
from flows.given import as_row as given_row  # noqa: E402
from flows.planning import as_row  # noqa: E402
from flows.preflight import prepare  # noqa: E402
from flows.recipe import load_recipe  # noqa: E402
from flows.runner import StepReport, run_diagram, run_step  # noqa: E402
from flows.terminal import Screen, results_console  # noqa: E402
from mi_pipe.core.artifact import Artifact, format_size  # noqa: E402
from mi_pipe.core.errors import ArtifactNotFoundError, MiPipeError  # noqa: E402
from mi_pipe.core.progress import Progress  # noqa: E402
from mi_pipe.core.store import Store  # noqa: E402
from mi_pipe.models.pulled import PULLABLE, pull_model  # noqa: E402
from mi_pipe.opening import open_artifact  # noqa: E402

_out = results_console()
DONE, FAILED, INTERRUPTED = 0, 1, 130


class _Interrupted(BaseException):
    """SIGINT or SIGTERM; not an Exception, so that nothing on the way takes it for a failure."""


def run_command(
    recipe: str,
    overrides: list[str],
    store: str | None,
    wait: bool,
    no_prefect: bool,
    workers: int = 1,
    dask: str | None = None,
) -> int:
    """Run a recipe; returns the exit code."""
    ready = prepare(recipe, overrides, store)
    where = ready.store
    _log_to(where)
    given = {"--store": store, "--workers": str(workers) if workers > 1 else None, "--dask": dask}
    options = [word for name, value in given.items() if value for word in (name, value)]
    again = shlex.join(["mi-pipe", "run", recipe, *overrides, *options])
    _catch_signals()
    Screen().given(ready.given)
    try:
        if no_prefect:
            reports = run_directly(ready, wait, workers, dask)
        else:
            from flows.pipeline import run_in_flow

            reports = run_in_flow(recipe, overrides, store, wait, workers, dask)
    except (_Interrupted, KeyboardInterrupt):
        _out.print(f"\nInterrupted. Finished steps and units are safe in {where.root}; this continues:\n  {again}")
        return INTERRUPTED
    return _summarise(reports, again)


def plan_command(recipe: str, overrides: list[str], store: str | None, as_json: bool, probe: bool) -> None:
    """Print what `run` would do, and what its harvests will take."""
    ready = prepare(recipe, overrides, store)
    if as_json:
        rows = [*map(given_row, ready.given), *map(as_row, ready.intents)]
        print(json.dumps(rows, indent=1))  # noqa: T201
        return
    Screen().plan(ready.intents, ready.given)
    for forecast in ready.forecasts:
        speed = measured_speed(forecast, ready.hooks, ready.store) if probe and ready.hooks else None
        _out.print("\n" + "\n".join(forecast.lines(speed)), markup=False, highlight=False)


def status_command(store: str | None) -> None:
    """Print every artifact of the store."""
    where = Store(store)
    table = Table(box=None, pad_edge=False)
    for heading in ("artifact", "state", "label", "size", "time", "made"):
        table.add_column(heading, justify="right" if heading in ("size", "time") else "left")
    total = 0
    for artifact_id in where.published_ids():
        try:
            manifest = Artifact(where.folder(artifact_id)).manifest
        except MiPipeError as error:
            table.add_row(artifact_id, "[red]damaged[/]", escape(str(error)))
            continue
        total += manifest.size_bytes
        size, seconds = format_size(manifest.size_bytes), f"{manifest.elapsed_s:.1f} s"
        table.add_row(artifact_id, "done", manifest.label, size, seconds, manifest.created_at)
    for artifact_id in where.unfinished_ids():
        ledger = where.ledger(artifact_id)
        state = "running" if where.is_locked(artifact_id) else "unfinished"
        table.add_row(artifact_id, f"[yellow]{state}[/]", f"{ledger.n_done} of {ledger.n_total or '?'} units")
    _out.print(f"Store {where.root}")
    _out.print(table)
    _out.print(f"{format_size(total)} in all")


def show_command(artifact_id: str, store: str | None) -> None:
    """Print one artifact."""
    artifact = open_artifact(artifact_id, store)
    manifest = artifact.manifest
    _out.print(repr(artifact), markup=False)
    _out.print(f"  path      {artifact.path}", markup=False)
    _out.print(f"  digest    {manifest.digest}")
    _out.print(f"  made      {manifest.created_at} in {manifest.elapsed_s:.1f} s, {manifest.n_launches} launch(es)")
    for role, ref in manifest.inputs.items():
        _out.print(f"  input     {role}: {ref.id}", markup=False)
    _out.print("  config    " + json.dumps(manifest.config, indent=1).replace("\n", "\n            "), markup=False)
    most = 20
    for name in list(manifest.files)[:most]:
        _out.print(f"  file      {name} ({format_size(manifest.files[name].size_bytes)})", markup=False)
    if len(manifest.files) > most:
        _out.print(f"  file      and {len(manifest.files) - most} more")


def rm_command(artifact_id: str, store: str | None, yes: bool) -> None:
    """Remove one artifact."""
    import click

    where = Store(store)
    known = {*where.published_ids(), *where.unfinished_ids()}
    known |= {artifact_id} if where.has_lost_manifest(artifact_id) else set()
    matches = sorted(item for item in known if item.startswith(artifact_id))
    if len(matches) != 1:
        raise ArtifactNotFoundError(f"{artifact_id!r} means {len(matches)} artifacts of {where.root}, not one.")
    if not yes:
        click.confirm(f"Remove {matches[0]} from {where.root}?", abort=True)
    where.remove(matches[0])
    _out.print(f"Removed {matches[0]}.")


def report_command(recipe: str, overrides: list[str], store: str | None) -> int:
    """Write the report of what exists of a recipe; returns the exit code."""
    ready = prepare(recipe, overrides, store)
    steps, where = ready.steps, ready.store
    done = {intent.step.id for intent in ready.intents if intent.action == "cached"}
    if steps[-1].stage.name != "report":
        raise ArtifactNotFoundError(f"Recipe {recipe!r} has no section 'report'.")

    def run_one(step: Step) -> StepReport:
        if step.id in done or step.stage.name == "report":
            return run_step(step, where, Progress())
        return StepReport(step, "Skipped")

    reports = run_diagram(steps, run_one, lambda _report: None)
    return _summarise(reports[-1:], "")


def pull_command(name: str, store: str | None) -> None:
    """Fetch a model."""
    folder = pull_model(name, Store(store))
    _out.print(f"{name} is in {folder}", markup=False)


def models_command(store: str | None) -> None:
    """List pullable models."""
    where = Store(store)
    for name, model in PULLABLE.items():
        here = "in the store" if (where.models / name / "config.json").exists() else "not pulled"
        _out.print(f"{name}  {format_size(model.size_bytes)}  {model.licence}  {here}")


def config_command(recipe: str, overrides: list[str]) -> None:
    """Print a recipe, defaults filled in."""
    content = load_recipe(recipe, overrides).model_dump(mode="json")
    print(yaml.safe_dump(content, sort_keys=False, allow_unicode=True), end="")  # noqa: T201


def _summarise(reports: list[StepReport], again: str) -> int:
    failed = [report for report in reports if report.outcome in ("Failed", "Skipped")]
    for report in reports:
        if report.step.stage.name == "report" and report.result is not None:
            _out.print(f"Report: {report.result.artifact.path / 'index.html'}", markup=False)
    if not failed:
        return DONE
    for report in failed:
        if report.outcome == "Failed":
            print(f"Error: {report.step.label}: {report.message}", file=sys.stderr)  # noqa: T201
    if again:
        _out.print(f"What is finished is safe; after mending, this continues:\n  {again}", markup=False)
    return FAILED


def _log_to(store: Store) -> None:
    """Log to a file of the store, so that a night's messages are there in the morning."""
    folder = store.root / "logs"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log"
    handler = logging.FileHandler(path, delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    for name in ("flows", "stages", "mi_pipe"):
        logger = logging.getLogger(name)
        logger.setLevel(logging.INFO)
        logger.addHandler(handler)
        logger.propagate = False


def _catch_signals() -> None:
    def stop(_number: int, _frame: Any) -> NoReturn:
        raise _Interrupted

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
