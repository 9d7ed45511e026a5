"""A page before it is written: its template's context, its figures, and the data it loads as it is read."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from mi_pipe.report.figures import Figure


@dataclass(frozen=True)
class Page:
    """What one page function returns."""

    context: dict[str, Any]
    """Names for the template `<slug>.html`."""
    figures: list[Figure] = field(default_factory=list)
    tables: dict[str, pd.DataFrame] = field(default_factory=dict)
    """Further tables, written as CSV and linked from the page."""
    scripts: Iterable[tuple[str, Any]] = ()
    """(key, payload) of data files that the page loads when it needs them; made one by one."""

    @classmethod
    def of_sections(cls, made: Iterable[tuple[dict[str, Any], list[Figure], dict[str, pd.DataFrame]]]) -> "Page":
        """Make a page of sections, one an artifact: each its context, its figures and its tables."""
        sections, figures, tables = [], [], {}
        for section, drawn, own in made:
            sections.append(section)
            figures += drawn
            tables |= own
        return cls(context={"sections": sections}, figures=figures, tables=tables)


@dataclass(frozen=True)
class PagePlan:
    """A page that the site will have: where it stands in the navigation and how it is made."""

    slug: str
    title: str
    make: Callable[[], Page]
    volatile: bool = False
    """True if it shows times or host facts, which differ between equal runs."""

    @property
    def file_name(self) -> str:
        """Name of the HTML file."""
        return f"{self.slug}.html"
