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
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Colormap, ListedColormap, Normalize, TwoSlopeNorm, to_hex
from matplotlib.figure import Figure as Drawing
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from mi_pipe.report.html import visible

INK = "#1f2430"
MUTED = "#6b7285"
GRID = "#d9dce3"
_DARK = {INK: "#e7e9ee", MUTED: "#9aa2b5", GRID: "#343a49"}
SERIES = ("#2f6fde", "#e8850c", "#1a9f78", "#c2569b", "#46aee0", "#d5533b", "#8a6fd1", "#7c8595")
_DASHES = ("-", "--", "-.", ":")
_PNG_DPI = 160
_N_STOPS = 24
_MAX_TICKS = 40
_LONG_LABEL = 3
_SHORT_SPAN = 100
_LARGE_TICK = 1e4
_STYLE: dict[str, Any] = {
    "svg.hashsalt": "mi_pipe",
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.labelsize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
    "legend.fontsize": 9,
    "figure.constrained_layout.use": True,
}


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
    with mpl.rc_context(_STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        drawing = Drawing(figsize=figure.size)
        FigureCanvasAgg(drawing)
        figure.draw(drawing.add_subplot())
        drawing.draw_without_rendering()
        drawing.set_layout_engine("none")  # the layout is found; saving would seek it twice more
        svg, png = io.BytesIO(), io.BytesIO()
        drawing.savefig(svg, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        drawing.savefig(png, format="png", dpi=_PNG_DPI, facecolor="white", metadata={"Software": None})
    return _themed(svg.getvalue()), png.getvalue()


def lines(
    name: str, title: str, alt: str, frame: pd.DataFrame, x: str, y: str | Sequence[str], **options: Any
) -> Figure:
    """Draw lines of one or more columns `y` over `x`, or one line a group with `by=column`.

    Further options: `x_title`, `y_title`, `caption`, `log_x`, `log_y`, `from_zero`, `markers`.
    """
    by = options.get("by")
    columns = [y] if isinstance(y, str) else list(y)
    series = _series(frame, x, columns, by)

    def draw(axes: Axes) -> None:
        for i, (label, xs, ys) in enumerate(series):
            axes.plot(
                xs, ys, label=visible(label), color=SERIES[i % len(SERIES)],
                linestyle=_DASHES[(i // len(SERIES)) % len(_DASHES)], marker="o" if options.get("markers") else "",
                markersize=4,
                clip_on=False,
            )  # fmt: skip
        _finish(axes, options)
        if len(series) > 1:
            _legend(axes, len(series))

    data = frame[[*([by] if by else []), x, *columns]]
    return Figure(name, title, alt, data, draw, options.get("caption", ""))


def scatter(name: str, title: str, alt: str, frame: pd.DataFrame, x: str, y: str, by: str, **options: Any) -> Figure:
    """Draw one labelled point a row of `frame`, coloured by the column `by`."""

    def draw(axes: Axes) -> None:
        for i, (label, rows) in enumerate(frame.groupby(by, sort=False, observed=True)):
            axes.scatter(rows[x], rows[y], s=64, color=SERIES[i % len(SERIES)], label=visible(str(label)), zorder=3)
        axes.margins(0.18)
        _finish(axes, options)
        _legend(axes, frame[by].nunique())

    return Figure(name, title, alt, frame, draw, options.get("caption", ""))


def bars(name: str, title: str, alt: str, frame: pd.DataFrame, label: str, value: str, **options: Any) -> Figure:
    """Draw one horizontal bar a row of `frame`, first row on top."""
    texts = [visible(str(text)) for text in frame[label]]

    def draw(axes: Axes) -> None:
        places = np.arange(len(texts))
        axes.barh(places, frame[value], height=0.62, color=options.get("color", SERIES[0]))
        axes.set_yticks(places, texts)
        axes.set_ylim(len(texts) - 0.5, -0.5)
        axes.grid(axis="y", visible=False)
        _finish(axes, options)

    height = 0.9 + 0.32 * max(len(texts), 2)
    return Figure(name, title, alt, frame, draw, options.get("caption", ""), (6.4, height))


def histogram(name: str, title: str, alt: str, values: Mapping[str, Any], **options: Any) -> Figure:
    """Draw step histograms over common bins of one or more samples; NaN is left out."""
    samples = {key: np.asarray(items, dtype=float)[np.isfinite(items)] for key, items in values.items()}
    pooled = np.concatenate([*samples.values(), np.empty(0)])
    edges = np.histogram_bin_edges(pooled, bins=options.get("n_bins", 48)) if pooled.size else np.array([0.0, 1.0])
    counts = {key: np.histogram(items, bins=edges)[0] for key, items in samples.items()}
    data = pd.DataFrame({"low": edges[:-1], "high": edges[1:], **counts})

    def draw(axes: Axes) -> None:
        for i, (key, height) in enumerate(counts.items()):
            color = SERIES[i % len(SERIES)]
            axes.stairs(height, edges, fill=True, color=color, alpha=0.22)
            axes.stairs(height, edges, color=color, linewidth=1.6, label=visible(key))
        _finish(axes, options)
        if len(counts) > 1:
            _legend(axes, len(counts))

    return Figure(name, title, alt, data, draw, options.get("caption", ""))


def heatmap(
    name: str, title: str, alt: str, values: np.ndarray, rows: Sequence[str], columns: Sequence[str], **options: Any
) -> Figure:
    """Draw a matrix (row, column), NaN left blank.

    Options: `row_title`, `column_title`, `value_title`, `caption`, `diverging` (colours centred at 0), `low` and
    `high` (range of the sequential colours; else that of the data).
    """
    shown = [[visible(str(text)) for text in labels] for labels in (rows, columns)]
    titles = [options.get(key, default) for key, default in _HEATMAP_TITLES.items()]
    low, high = _colour_range(values, options)
    is_diverging = bool(options.get("diverging"))

    def draw(axes: Axes) -> None:
        norm = TwoSlopeNorm(0.0, low, high) if is_diverging else Normalize(low, high)
        image = axes.imshow(values, cmap=_colour_map(is_diverging), norm=norm, aspect="auto", interpolation="nearest")
        _label_cells(axes, shown[0], shown[1])
        axes.set_ylabel(titles[0])
        axes.set_xlabel(titles[1])
        bar = axes.figure.colorbar(image, ax=axes, label=titles[2], pad=0.02, aspect=28)
        bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]

    grid = np.indices(values.shape)
    data = pd.DataFrame({
        titles[0]: np.asarray(rows, dtype=object)[grid[0].ravel()],
        f"{titles[1]} " if titles[0] == titles[1] else titles[1]: np.asarray(columns, dtype=object)[grid[1].ravel()],
        titles[2]: values.ravel(),
    })  # fmt: skip
    view = {
        "rows": shown[0], "columns": shown[1], "values": rounded(values), "low": low, "high": high,
        "row_title": titles[0], "column_title": titles[1], "value_title": titles[2], **colour_stops(is_diverging),
    }  # fmt: skip
    size = (min(2.2 + 0.34 * max(len(columns), 6), 12.0), min(1.5 + 0.3 * max(len(rows), 4), 10.0))
    return Figure(name, title, alt, data, draw, options.get("caption", ""), size, view)


_HEATMAP_TITLES = {"row_title": "row", "column_title": "column", "value_title": "value"}


def colour_stops(diverging: bool) -> dict[str, list[str]]:
    """Return colours from low to high for a light page (`stops`) and for a dark one (`stops_dark`)."""
    light = _colour_map(diverging)
    dark = mpl.colormaps["berlin_r" if diverging else "magma"]
    from_place = 0.0 if diverging else 0.14
    return {
        "stops": [to_hex(light(place)) for place in np.linspace(0, 1, _N_STOPS)],
        "stops_dark": [to_hex(dark(place)) for place in np.linspace(from_place, 1, _N_STOPS)],
    }


def _colour_map(diverging: bool) -> Colormap:
    """Return the light page's map: red-white-blue, or magma from pale to dark without its darkest end."""
    if diverging:
        return mpl.colormaps["RdBu"]
    places = np.linspace(0, 1, 256)
    colours = mpl.colormaps["magma_r"](0.88 * places)[:, :3]
    whiteness = 0.8 * (1 - places[:, None]) ** 4
    return ListedColormap(colours * (1 - whiteness) + whiteness)


def rounded(values: np.ndarray, digits: int = 5) -> list[Any]:
    """Return the array as nested lists with numbers of `digits` significant digits, NaN as None."""
    if values.ndim > 1:
        return [rounded(part, digits) for part in values]
    return [float(f"{value:.{digits}g}") if np.isfinite(value) else None for value in values.tolist()]


def _colour_range(values: np.ndarray, options: Mapping[str, Any]) -> tuple[float, float]:
    """Return the values of the first and last colour: symmetric around 0 for diverging maps, never empty."""
    finite = values[np.isfinite(values)]
    if options.get("diverging"):
        bound = float(np.abs(finite).max()) if finite.size else 1.0
        return (-bound, bound) if bound > 0 else (-1.0, 1.0)
    low = options.get("low", float(finite.min()) if finite.size else 0.0)
    high = options.get("high", float(finite.max()) if finite.size else 1.0)
    return (float(low), float(high)) if high > low else (float(low), float(low) + 1.0)


def _series(frame: pd.DataFrame, x: str, columns: list[str], by: str | None) -> list[tuple[str, Any, Any]]:
    if by is None:
        return [(column, frame[x], frame[column]) for column in columns]
    return [(str(key), rows[x], rows[columns[0]]) for key, rows in frame.groupby(by, sort=False, observed=True)]


def _finish(axes: Axes, options: Mapping[str, Any]) -> None:
    axes.set_xlabel(options.get("x_title", ""))
    axes.set_ylabel(options.get("y_title", ""))
    axes.tick_params(length=0)
    if options.get("log_x"):
        log_scale(axes, "x")
    if options.get("log_y"):
        log_scale(axes, "y")
    for axis, (low, high) in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
        if axis.get_scale() == "linear" and max(abs(low), abs(high)) >= _LARGE_TICK:
            axis.set_major_formatter(FuncFormatter(lambda value, _: _brief(value)))
    if options.get("from_zero"):
        axes.set_ylim(bottom=0)


def log_scale(axes: Axes, which: Literal["x", "y"]) -> None:
    """Make an axis logarithmic with plain numbers; mathematical text is off, since labels come from models."""
    axes.set(**{f"{which}scale": "log"})
    axis = axes.xaxis if which == "x" else axes.yaxis
    low, high = axes.get_xlim() if which == "x" else axes.get_ylim()
    if high < low * _SHORT_SPAN:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: _brief(value)))
    axis.set_minor_formatter(NullFormatter())


def _brief(value: float) -> str:
    """Write a tick's number: 25000 is 25k."""
    for size, sign in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if sign == 'k' else size):g}{sign}"
    return f"{value:g}"


def _legend(axes: Axes, n_entries: int) -> None:
    """Put the legend above the plot, where it hides no data; with many series it says how many are left out."""
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[:12], labels[:12], loc="lower left", bbox_to_anchor=(0, 1.01), ncols=2 if n_entries > 1 else 1)


def _label_cells(axes: Axes, rows: Sequence[str], columns: Sequence[str]) -> None:
    axes.grid(visible=False)
    axes.tick_params(length=0)
    for axis, labels, tick in ((axes.yaxis, rows, "y"), (axes.xaxis, columns, "x")):
        if len(labels) <= _MAX_TICKS:
            is_slanted = tick == "x" and max(map(len, labels), default=0) > _LONG_LABEL
            slant = {"rotation": 60, "ha": "right", "rotation_mode": "anchor"} if is_slanted else {}
            axis.set_ticks(np.arange(len(labels)), labels, **slant)
        else:
            axis.set_major_locator(MaxNLocator(integer=True, nbins=12))
    for spine in axes.spines.values():
        spine.set_visible(False)


def _themed(svg: bytes) -> bytes:
    """Let the SVG's own ink turn light on dark systems, and use the reader's font where there is one."""
    rules = "".join(
        f'[style*="{part}: {light}"]{{{part}:{dark}!important}}'
        for light, dark in _DARK.items()
        for part in ("fill", "stroke")
    )
    style = f"<style>@media (prefers-color-scheme: dark){{{rules}}}</style>"
    text = svg.decode().replace("'DejaVu Sans'", "system-ui, 'DejaVu Sans'")
    head, start, rest = text.partition("<defs>")
    return f"{head}{style}\n{start}{rest}".encode()
