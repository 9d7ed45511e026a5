"""Figures: a drawing (SVG and PNG), its data as a table, and what a page needs to show it interactively.

Drawn with matplotlib's object interface, without pyplot's global state. The SVG is a function of the data alone
(fixed hash salt, no date), keeps its text as text, and carries a style that turns its ink light where the reader's
system is dark. Score maps are sequential (magma, paled toward its low end); effect maps diverge around 0 (blue is
positive, red negative).
"""

import io
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Drawing

from mi_pipe.report.html import shortened
from mi_pipe.report.style import SERIES, STYLE, finish, legend, themed

_DASHES = ("-", "--", "-.", ":")
_PNG_DPI = 160
_BAND_ALPHA = 0.15
_LONGEST = 48
"""Characters of a name in a legend or beside a bar."""


@dataclass(frozen=True)
class Figure:
    """One figure of a page; `name` is unique in the page and becomes the stem of its files."""

    name: str
    title: str
    alt: str
    data: pd.DataFrame
    draw: Callable[[Axes], None]
    caption: str = ""
    size: tuple[float, float] = (6.4, 3.4)
    view: dict[str, Any] | None = field(default=None, compare=False)
    """For a heatmap: what the page's script needs to draw it interactively."""


def rendered(figure: Figure) -> tuple[bytes, bytes]:
    """Return the figure as SVG and as PNG."""
    with mpl.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        drawing = Drawing(figsize=figure.size)
        FigureCanvasAgg(drawing)
        figure.draw(drawing.add_subplot())
        drawing.draw_without_rendering()
        drawing.set_layout_engine("none")  # the layout is found; saving would seek it twice more
        svg, png = io.BytesIO(), io.BytesIO()
        drawing.savefig(svg, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        drawing.savefig(png, format="png", dpi=_PNG_DPI, facecolor="white", metadata={"Software": None})
    return themed(svg.getvalue()), png.getvalue()


def lines(
    name: str, title: str, alt: str, frame: pd.DataFrame, x: str, y: str | Sequence[str], **options: Any
) -> Figure:
    """Draw lines of one or more columns `y` over `x`, or one line a group with `by=column`.

    Further options: `x_title`, `y_title`, `caption`, `log_x`, `log_y`, `whole_x`, `from_zero`, `markers`; `band`, the
    columns of each point's interval, with `by`; `keep`, further columns of the data; `families`, line to the family
    whose colour it has where there are more lines than colours; `controls`, line to the line whose colour it has.
    """
    by = options.get("by")
    columns = [y] if isinstance(y, str) else list(y)
    series = _series(frame, x, columns, by)
    controls = options.get("controls") or {}
    families = {label: controls.get(label, label) for label, _, _ in series} if controls else options.get("families")
    looks = _looks([label for label, _, _ in series], families or {}, always=bool(controls))
    band = tuple(options.get("band", ()))
    bands = list(zip(*(_series(frame, x, [side], by) for side in band), strict=True))

    def draw(axes: Axes) -> None:
        for ((_, xs, lows), (_, _, highs)), look in zip(bands, looks, strict=False):
            axes.fill_between(xs, lows, highs, color=look["color"], alpha=_BAND_ALPHA, linewidth=0)
        for (_, xs, ys), look in zip(series, looks, strict=True):
            axes.plot(xs, ys, **look, marker="o" if options.get("markers") else "", markersize=4, clip_on=False)
        finish(axes, options)
        if len(series) > 1:
            legend(axes, len(series))

    data = frame.loc[:, [*([by] if by else []), *options.get("keep", ()), x, *columns, *band]]
    return Figure(name, title, alt, data, draw, options.get("caption", ""))


def scatter(name: str, title: str, alt: str, frame: pd.DataFrame, x: str, y: str, by: str, **options: Any) -> Figure:
    """Draw one labelled point a row of `frame`, coloured by the column `by`."""

    def draw(axes: Axes) -> None:
        for i, (label, rows) in enumerate(frame.groupby(by, sort=False, observed=True)):
            axes.scatter(
                rows[x], rows[y], s=64, color=SERIES[i % len(SERIES)], label=shortened(str(label), _LONGEST), zorder=3
            )
        axes.margins(0.18)
        finish(axes, options)
        legend(axes, len(set(frame[by])))

    return Figure(name, title, alt, frame, draw, options.get("caption", ""))


def bars(name: str, title: str, alt: str, frame: pd.DataFrame, label: str, value: str, **options: Any) -> Figure:
    """Draw one horizontal bar a row of `frame`, first row on top."""
    texts = [shortened(str(text), _LONGEST) for text in frame[label]]

    def draw(axes: Axes) -> None:
        places = np.arange(len(texts))
        axes.barh(places, frame[value], height=0.62, color=options.get("color", SERIES[0]))
        axes.set_yticks(places, texts)
        axes.set_ylim(len(texts) - 0.5, -0.5)
        axes.grid(axis="y", visible=False)
        finish(axes, options)

    height = 0.9 + 0.32 * max(len(texts), 2)
    return Figure(name, title, alt, frame, draw, options.get("caption", ""), (6.4, height))


def histogram(name: str, title: str, alt: str, values: Mapping[str, Any], **options: Any) -> Figure:
    """Draw step histograms over common bins of one or more samples; NaN is left out.

    Further options: `x_title`, `y_title`, `caption`, `n_bins`; `span`, the range of the bins if not that of the values.
    """
    samples = {key: np.asarray(items, dtype=float)[np.isfinite(items)] for key, items in values.items()}
    pooled = np.concatenate([*samples.values(), np.empty(0)])
    n_bins, span = options.get("n_bins", 48), options.get("span")
    edges = np.histogram_bin_edges(pooled, bins=n_bins, range=span) if pooled.size else np.array([0.0, 1.0])
    counts = {key: np.histogram(items, bins=edges)[0] for key, items in samples.items()}
    data = pd.DataFrame({"low": edges[:-1], "high": edges[1:], **counts})

    def draw(axes: Axes) -> None:
        for i, (key, height) in enumerate(counts.items()):
            color = SERIES[i % len(SERIES)]
            axes.stairs(height, edges, fill=True, color=color, alpha=0.22)
            axes.stairs(height, edges, color=color, linewidth=1.6, label=shortened(key, _LONGEST))
        finish(axes, options)
        if len(counts) > 1:
            legend(axes, len(counts))

    return Figure(name, title, alt, data, draw, options.get("caption", ""))


def _series(frame: pd.DataFrame, x: str, columns: list[str], by: str | None) -> list[tuple[str, Any, Any]]:
    if by is None:
        return [(column, frame[x], frame[column]) for column in columns]
    return [(str(key), rows[x], rows[columns[0]]) for key, rows in frame.groupby(by, sort=False, observed=True)]


def _looks(labels: Sequence[str], families: Mapping[str, str], always: bool = False) -> list[dict[str, Any]]:
    """Return label, colour and dashes of each line; a family shares a colour and is named once in the legend."""
    known = [families.get(label, "") for label in labels]
    if not always and (len(labels) <= len(SERIES) or not all(known) or len(set(known)) == 1):
        known = list(labels)
    order = {name: i for i, name in enumerate(dict.fromkeys(known))}
    looks, seen = [], dict.fromkeys(known, 0)
    for name in known:
        place = order[name]
        dashes = _DASHES[(place // len(SERIES) + seen[name]) % len(_DASHES)]
        # Matplotlib leaves labels that begin with an underscore out of legends.
        label = f"_{name}" if seen[name] else shortened(name, _LONGEST)
        looks.append({"label": label, "color": SERIES[place % len(SERIES)], "linestyle": dashes})
        seen[name] += 1
    return looks
