"""Puts pages on disk: HTML, figures as SVG and PNG with their data as CSV, and data scripts.

Folders: `<page>.html` beside `figures/<page>/`, `data/<page>/`, `data/<key>.js` and `static/`. Everything a page
refers to is written before the page itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import pandas as pd

from mi_pipe.core import atomic
from mi_pipe.core.workspace import Workspace
from mi_pipe.report.figures import Figure, rendered
from mi_pipe.report.html import data_script, render
from mi_pipe.report.page import PagePlan

STATIC = "static"


@dataclass(frozen=True)
class SiteHeader:
    """What every page shows around its content."""

    title: str
    recipe_name: str
    pages: Sequence[PagePlan]


class SiteWriter:
    """Writes the pages of one report into its workspace."""

    def __init__(self, work: Workspace, header: SiteHeader) -> None:
        """Write into `work`, with `header` on every page."""
        self._work = work
        self._header = header

    def write_static(self) -> None:
        """Copy the style sheets and scripts that pages share."""
        for item in sorted(files("mi_pipe.report").joinpath(STATIC).iterdir(), key=lambda item: item.name):
            if item.name.endswith((".css", ".js")):
                atomic.write_bytes(self._work.path(f"{STATIC}/{item.name}"), item.read_bytes())

    def write(self, plan: PagePlan, extra: dict[str, Any] | None = None) -> list[dict[str, str]]:
        """Make and write one page with all its files; returns its figures (title, alt, caption, file names)."""
        page = plan.make()
        figures = {figure.name: self._write_figure(plan, figure) for figure in page.figures}
        tables = {name: self._write_table(plan, name, table) for name, table in page.tables.items()}
        for key, payload in page.scripts:
            self._write_text(f"data/{key}.js", data_script(key, payload), plan.volatile)
        context = page.context | {"plan": plan, "site": self._header, "figures_of": figures, "tables": tables}
        self._write_text(plan.file_name, render(plan.file_name, context | (extra or {})), plan.volatile)
        return [{key: shown for key, shown in figure.items() if key != "view"} for figure in figures.values()]

    def _write_figure(self, plan: PagePlan, figure: Figure) -> dict[str, Any]:
        stem = f"figures/{plan.slug}/{figure.name}"
        svg, png = rendered(figure)
        self._write_bytes(f"{stem}.svg", svg, plan.volatile)
        self._write_bytes(f"{stem}.png", png, plan.volatile)
        csv = self._write_table(plan, figure.name, figure.data)
        shown = {"name": figure.name, "title": figure.title, "alt": figure.alt, "caption": figure.caption}
        return shown | {"svg": f"{stem}.svg", "png": f"{stem}.png", "csv": csv, "view": figure.view}

    def _write_table(self, plan: PagePlan, name: str, table: pd.DataFrame) -> str:
        path = f"data/{plan.slug}/{name}.csv"
        self._write_text(path, table.to_csv(index=False, lineterminator="\n", float_format="%.9g"), plan.volatile)
        return path

    def _write_text(self, name: str, text: str, is_volatile: bool) -> None:
        self._write_bytes(name, text.encode("utf-8", "backslashreplace"), is_volatile)

    def _write_bytes(self, name: str, data: bytes, is_volatile: bool) -> None:
        atomic.write_bytes(self._work.path(name), data)
        if is_volatile:
            self._work.volatile(name)
