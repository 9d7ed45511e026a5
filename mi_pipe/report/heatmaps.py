"""Heatmaps: as figures, and as the data from which a page draws them interactively."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, ListedColormap, Normalize, TwoSlopeNorm, to_hex
from matplotlib.ticker import MaxNLocator

from mi_pipe.report.figures import Figure
from mi_pipe.report.html import rounded, shortened

_N_STOPS = 24
_MAX_TICKS = 40
_LONG_LABEL = 3
_HATCH = "#c8c8c4"


def heatmap(
    name: str, title: str, alt: str, values: np.ndarray, rows: Sequence[str], columns: Sequence[str], **options: Any
) -> Figure:
    """Draw a matrix (row, column), NaN left blank, and hatched where 0 would look the same.

    Options: `row_title`, `column_title`, `value_title`, `caption`, `diverging` (colours centred at 0), `low` and
    `high` (range of the sequential colours; else that of the data).
    """
    shown = [[shortened(str(text)) for text in labels] for labels in (rows, columns)]
    titles = [options.get(key, default) for key, default in _HEATMAP_TITLES.items()]
    low, high = _colour_range(values, options)
    is_diverging = bool(options.get("diverging"))

    def draw(axes: Axes) -> None:
        norm = TwoSlopeNorm(0.0, low, high) if is_diverging else Normalize(low, high)
        if is_diverging:
            axes.patch.set(hatch="////", edgecolor=_HATCH)
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
        "row_title": titles[0], "column_title": titles[1], "value_title": titles[2], "hatch_missing": is_diverging,
        **colour_stops(is_diverging),
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


def _colour_range(values: np.ndarray, options: Mapping[str, Any]) -> tuple[float, float]:
    """Return the values of the first and last colour: symmetric around 0 for diverging maps, never empty."""
    finite = values[np.isfinite(values)]
    if options.get("diverging"):
        bound = float(np.abs(finite).max()) if finite.size else 1.0
        return (-bound, bound) if bound > 0 else (-1.0, 1.0)
    low = options.get("low", float(finite.min()) if finite.size else 0.0)
    high = options.get("high", float(finite.max()) if finite.size else 1.0)
    return (float(low), float(high)) if high > low else (float(low), float(low) + 1.0)


def _label_cells(axes: Axes, rows: Sequence[str], columns: Sequence[str]) -> None:
    axes.grid(visible=False)
    axes.tick_params(length=0)
    for axis, labels, tick in ((axes.yaxis, rows, "y"), (axes.xaxis, columns, "x")):
        if len(labels) <= _MAX_TICKS:
            is_slanted = tick == "x" and max(map(len, labels), default=0) > _LONG_LABEL
            axis.set_ticks(np.arange(len(labels)), labels)
            for label in axis.get_ticklabels() if is_slanted else ():
                label.set(rotation=60, ha="right", rotation_mode="anchor")
        else:
            axis.set_major_locator(MaxNLocator(integer=True, nbins=12))
    for spine in axes.spines.values():
        spine.set_visible(False)
