"""How figures look: colours, type, axes, and an SVG whose ink follows the reader's light or dark system."""

from collections.abc import Mapping
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

INK = "#1f2430"
MUTED = "#6b7285"
GRID = "#d9dce3"
_DARK = {INK: "#e7e9ee", MUTED: "#9aa2b5", GRID: "#343a49"}
SERIES = ("#2f6fde", "#e8850c", "#1a9f78", "#c2569b", "#46aee0", "#d5533b", "#8a6fd1", "#7c8595")
_SHORT_SPAN = 100
_FLAT_SPAN = 3
_LARGE_TICK = 1e4
_MAX_NAMED = 12
_LONG = 36
"""Characters of a name of which two do not stand side by side."""
STYLE: Any = {
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


def finish(axes: Axes, options: Mapping[str, Any]) -> None:
    """Set titles, scales and ticks: `x_title`, `y_title`, `log_x`, `log_y`, `whole_x`, `from_zero`."""
    axes.set_xlabel(options.get("x_title", ""))
    axes.set_ylabel(options.get("y_title", ""))
    axes.tick_params(length=0)
    if options.get("log_x"):
        log_scale(axes, "x")
    if options.get("log_y"):
        log_scale(axes, "y")
    if options.get("whole_x"):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
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
    if high < low * _FLAT_SPAN:
        axis.set_major_locator(MaxNLocator(6))
    elif high < low * _SHORT_SPAN:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: _brief(value)))
    axis.set_minor_formatter(NullFormatter())


def _brief(value: float) -> str:
    """Write a tick's number: 25000 is 25k."""
    for size, sign in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if sign == 'k' else size):g}{sign}"
    return f"{value:g}"


def legend(axes: Axes, n_entries: int) -> None:
    """Put the legend above the plot, where it hides no data; with many series it says how many it does not name."""
    handles, labels = axes.get_legend_handles_labels()
    n_more = len(handles) - _MAX_NAMED
    axes.legend(
        handles[:_MAX_NAMED],
        labels[:_MAX_NAMED],
        title=f"and {n_more} more" if n_more > 0 else None,
        loc="lower left",
        bbox_to_anchor=(0, 1.01),
        ncols=1 if any(len(label) > _LONG for label in labels[:_MAX_NAMED]) else min(n_entries, 2),
    )


def themed(svg: bytes) -> bytes:
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
