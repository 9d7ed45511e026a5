"""What a person sees while a recipe runs: one line a finished step on stdout, progress on stderr."""

import sys
import time
from collections.abc import Iterable
from types import TracebackType

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from flows.given import Given
from flows.given import as_row as given_row
from flows.planning import Intent
from flows.runner import StepReport
from flows.sae_lines import sae_lines
from mi_pipe.core.progress import Tick
from mi_pipe.saes.sae_set import SAESet
from stages import train_saes

_MARKS = {"Cached": "[dim]=[/]", "Resumed": "[green]+[/]", "Completed": "[green]+[/]", "Failed": "[red]x[/]"}
_COLOURS = {"cached": "dim", "resume": "yellow", "run": "green", "wait": "red"}
_LINE_EVERY_S = 60.0
_FILE_WIDTH = 200
_MOST_FIGURES = 4


def results_console() -> Console:
    """Return the console for results: as wide as the terminal, or wide enough for a table in a file or pipe."""
    return Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else _FILE_WIDTH)


class Screen:
    """Shows steps as they end, and a progress bar (on a terminal) or a line a minute (in a log)."""

    def __init__(self) -> None:
        """Write results to stdout and progress to stderr."""
        self.out = results_console()
        err = Console(stderr=True)
        columns = (
            TextColumn("  {task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[count]}"),
            TimeRemainingColumn(),
            TextColumn("[dim]{task.fields[note]}"),
        )
        self._bar = Progress(*columns, console=err, transient=True, disable=not err.is_terminal)
        self._task = self._bar.add_task("", count="", note="", visible=False)
        self._label = ""
        self._last_line = 0.0

    def __enter__(self) -> "Screen":
        """Start showing progress."""
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Take the progress bar away."""
        self._bar.stop()

    def begin(self, label: str) -> None:
        """Name the step that works now."""
        self._label = label
        self._last_line = time.monotonic()
        self._bar.reset(self._task, description=label, count="", note="", visible=True, total=None)

    def tick(self, tick: Tick) -> None:
        """Show progress of the present step."""
        count = f"{tick.done:,.0f}/{tick.total:,.0f} {tick.unit}"
        self._bar.update(
            self._task, description=self._label, completed=tick.done, total=tick.total, count=count, note=tick.note
        )
        if self._bar.disable and time.monotonic() - self._last_line > _LINE_EVERY_S:
            self._last_line = time.monotonic()
            print(f"  {self._label}: {count} {tick.note}", file=sys.stderr, flush=True)  # noqa: T201

    def report(self, report: StepReport) -> None:
        """Print how a step ended, with its main figures."""
        self._bar.update(self._task, visible=False)
        mark = _MARKS.get(report.outcome, "[yellow]-[/]")
        self.out.print(f"{mark} {report.step.label:<22} {report.outcome:<9} {report.seconds:>7.1f} s  {_tail(report)}")
        if report.result is not None and report.outcome != "Cached" and report.step.stage is train_saes.STAGE:
            for line in sae_lines(SAESet(report.result.artifact.path)):
                self.out.print(f"    {line}", markup=False)

    def given(self, given: Iterable[Given]) -> None:
        """Print what steps read that is there already."""
        for row in map(given_row, given):
            text = escape(f"{row['id']}  {row['reason']}")
            self.out.print(f"{_MARKS['Cached']} {row['step']:<22} Given                [dim]{text}[/]")

    def plan(self, intents: list[Intent], given: Iterable[Given] = ()) -> None:
        """Print what is given, and what each step would do and why."""
        table = Table(box=None, pad_edge=False)
        for heading in ("step", "now", "why", "artifact"):
            table.add_column(heading, overflow="fold")
        for row in map(given_row, given):
            table.add_row(row["step"], f"[dim]{row['action']}[/]", escape(row["reason"]), f"[dim]{row['id']}[/]")
        for intent in intents:
            colour = _COLOURS[intent.action]
            reason = "" if intent.action == "cached" else intent.reason
            table.add_row(intent.step.label, f"[{colour}]{intent.action}[/]", reason, f"[dim]{intent.step.id}[/]")
        self.out.print(table)


def _tail(report: StepReport) -> str:
    if report.result is None:
        return escape(report.message)
    figures = list(report.result.artifact.summary.items())[:_MOST_FIGURES]
    shown = "  ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in figures
    )
    return f"[dim]{report.result.artifact.id}[/]  {escape(shown)}"
