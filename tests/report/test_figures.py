import xml.etree.ElementTree as ElementTree

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure as MatplotlibFigure

from mi_pipe.report.figures import bars, histogram, lines, rendered, scatter
from mi_pipe.report.heatmaps import colour_stops, heatmap
from mi_pipe.report.style import SERIES, log_scale
from tests.report.samples import TOKENS

VALUES = np.arange(20.0).reshape(2, 10)


def every_kind():
    frame = pd.DataFrame({"x": [1, 2, 3], "y": [1.0, 10.0, 100.0], "by": TOKENS[:3]})
    return [
        lines("l", "t", "a", frame, "x", "y", by="by", log_y=True),
        scatter("s", "t", "a", frame, "x", "y", "by"),
        bars("b", "t", "a", frame, "by", "y"),
        histogram("h", "t", "a", {TOKENS[1]: np.array([1.0, np.nan, 2.0])}),
        heatmap("m", "t", "a", VALUES, ["0", "1"], TOKENS),
        heatmap("d", "t", "a", np.where(VALUES < 4, np.nan, VALUES), ["0", "1"], TOKENS, diverging=True),
    ]


@pytest.mark.parametrize("figure", every_kind(), ids=lambda figure: figure.name)
def test_a_figure_is_well_formed_and_the_same_bytes_each_time(figure):
    svg, png = rendered(figure)
    assert (svg, png) == rendered(figure)
    assert png.startswith(b"\x89PNG")
    text = "".join(ElementTree.fromstring(svg).itertext())
    assert "\x00" not in text
    assert len(figure.data) > 0


def test_token_labels_reach_the_drawing_as_text():
    svg, _ = rendered(heatmap("m", "t", "a", VALUES, ["0", "1"], TOKENS))
    text = "".join(ElementTree.fromstring(svg).itertext())
    assert "$x^2$" in text
    assert "</script><img src=x one" in text
    assert b"<img" not in svg


def test_more_lines_than_colours_have_the_colours_of_their_families():
    names = [f"{kind}.k{k}" for kind in ("topk", "gated") for k in range(5)]
    frame = pd.DataFrame({"x": 1.0, "y": 1.0, "by": names})
    families = {name: name.partition(".")[0] for name in names}
    svg, _ = rendered(lines("l", "t", "a", frame, "x", "y", by="by", markers=True, families=families))
    text = "".join(ElementTree.fromstring(svg).itertext())
    assert all(text.count(word) == 1 for word in families.values())
    assert not any(name in text for name in names)
    assert {colour for colour in SERIES if f"stroke: {colour}" in svg.decode()} == set(SERIES[:2])
    svg, _ = rendered(lines("l", "t", "a", frame.head(8), "x", "y", by="by", families=families))
    assert all(name in svg.decode() for name in names[:8]), "as many lines as colours are told apart by these"


def test_log_ticks_are_plain_numbers():
    frame = pd.DataFrame({"x": [1, 10, 1000], "y": [1.0, 2.0, 3.0]})
    svg, _ = rendered(lines("l", "t", "a", frame, "x", "y", log_x=True))
    assert b"mathdefault" not in svg
    assert b">100<" in svg


def test_effects_are_centred_on_zero_and_unmeasured_cells_stay_unmeasured():
    values = np.array([[np.nan, -1.0, 3.0]])
    figure = heatmap("m", "t", "a", values, ["0"], ["a", "b", "c"], diverging=True, value_title="effect")
    assert (figure.view["low"], figure.view["high"]) == (-3.0, 3.0)
    assert figure.view["values"] == [[None, -1.0, 3.0]]
    assert figure.data["effect"].isna().tolist() == [True, False, False]


@pytest.mark.parametrize("values", [np.full((2, 2), np.nan), np.zeros((2, 2))])
@pytest.mark.parametrize("diverging", [True, False])
def test_maps_without_range_can_be_drawn(values, diverging):
    figure = heatmap("m", "t", "a", values, list("ab"), list("cd"), diverging=diverging)
    assert figure.view["high"] > figure.view["low"]
    rendered(figure)


def test_score_colours_grow_steadily_darker():
    stops = colour_stops(diverging=False)["stops"]
    lightness = [sum(int(stop[i : i + 2], 16) * w for i, w in ((1, 0.299), (3, 0.587), (5, 0.114))) for stop in stops]
    assert lightness == sorted(lightness, reverse=True)


def test_the_heatmap_table_has_one_row_a_cell():
    figure = heatmap("m", "t", "a", VALUES, ["0", "1"], TOKENS, row_title="layer", column_title="token")
    assert list(figure.data.columns) == ["layer", "token", "value"]
    assert figure.data.iloc[11].tolist() == ["1", TOKENS[1], 11.0]


def test_what_was_not_measured_is_marked_where_zero_is_pale():
    values = np.array([[np.nan, 0.0, -1.0]])
    for diverging in (True, False):
        view = heatmap("h", "H", "h", values, ["0"], ["a", "b", "c"], diverging=diverging).view
        assert view is not None
        assert view["values"][0][0] is None
        assert view["hatch_missing"] is diverging


def test_a_narrow_logarithmic_axis_has_several_ticks():
    axes = MatplotlibFigure().subplots()
    axes.plot([0, 1], [1.0, 1.03])
    log_scale(axes, "y")
    low, high = axes.get_ylim()
    assert sum(low <= tick <= high for tick in axes.get_yticks()) >= 3
