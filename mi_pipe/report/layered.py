"""The drawing of a circuit as a layered graph: where nodes stand, how edges run. Pixels, y grows downward.

The embedding is below and the logits on top; each layer has a row for its heads, one for its MLP, and, where heads
share keys and values, one for the shared heads. An edge ends at the node that reads it, by q, k or v.
"""

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch, PathPatch
from matplotlib.path import Path as Curve

from mi_pipe.report.style import INK, MUTED, SERIES

MAX_DRAWN = 300
_STEP_X = 74
_STEP_Y, _DENSE_STEP_Y, _MANY_ROWS = 84, 56, 14
NODE_WIDTH, NODE_HEIGHT = 58, 30
_MARGIN_X, _MARGIN_Y = 100, 34
_NODE = re.compile(r"(?P<kind>[am])(?P<layer>\d+)(?:\.(?P<part>h|kv)(?P<head>\d+))?")
_EMBED, _TOP = -1, 1_000_000
_ENTRY = {"q": -14, "k": 0, "v": 14}
_THINNEST, _WIDEST = 0.6, 6.0
_COLOURS = {"helps": SERIES[0], "hinders": SERIES[5], "feeds": MUTED}


@dataclass(frozen=True)
class Node:
    """A node and its place."""

    name: str
    kind: str
    x: float
    y: float


@dataclass(frozen=True)
class Edge:
    """An edge of the circuit, by q, k or v where its reader has them, and its curve's four points."""

    source: str
    target: str
    how: str
    score: float
    width: float
    curve: tuple[tuple[float, float], ...]
    part: str
    """What the edge does for the answer: "helps", "hinders", or "feeds" (no score)."""

    @property
    def path(self) -> str:
        """The curve as SVG."""
        (x0, y0), *rest = self.curve
        return f"M{x0:g} {y0:g}C" + " ".join(f"{x:g} {y:g}" for x, y in rest)


@dataclass(frozen=True)
class LayeredGraph:
    """Nodes, edges (widest last, so that they lie on top), titles of the rows with their height, and the size."""

    nodes: list[Node]
    edges: list[Edge]
    feeds: list[Edge]
    """From a shared key/value head to each head of the circuit that uses it; no score."""
    rows: list[tuple[str, float]]
    width: float
    height: float
    n_hidden: int
    """Edges of the circuit that are not drawn, the weakest."""


def folded(reader: str) -> tuple[str, str]:
    """Return the node that a reader belongs to, and how it reads.

    >>> folded("a1.h2.q"), folded("m1")
    (('a1.h2', 'q'), ('m1', ''))
    """
    name, _, how = reader.rpartition(".")
    return (name, how) if how in _ENTRY and name else (reader, "")


def by_strength(edges: pd.DataFrame) -> pd.DataFrame:
    """Return edges by the size of their score, largest first; equals keep their order."""
    return edges.iloc[np.argsort(-np.abs(edges["score"].to_numpy(float)), kind="stable")]


def layered_graph(edges: pd.DataFrame, nodes: pd.DataFrame, helping_sign: float) -> LayeredGraph:
    """Lay out a circuit: its rows of `edges.parquet`, and all of `nodes.parquet`.

    `helping_sign` is the sign of the score of an edge that works for the answer: -1 where the score is what
    corrupting the edge does to the metric (noising), else 1.
    """
    drawn = by_strength(edges).head(MAX_DRAWN).iloc[::-1]
    links = [
        (str(source), *folded(str(target)), float(score))
        for source, target, score in zip(drawn["source"], drawn["target"], drawn["score"], strict=True)
    ]
    names = list(dict.fromkeys(name for source, target, _, _ in links for name in (source, target)))
    placed, rows, size = _placed(names)
    largest = max((abs(score) for *_, score in links), default=1.0) or 1.0
    return LayeredGraph(
        nodes=list(placed.values()),
        edges=[
            _edge(placed, link, _THINNEST + (_WIDEST - _THINNEST) * abs(link[3]) / largest,
                  "helps" if link[3] * helping_sign > 0 else "hinders")
            for link in links
        ],
        feeds=[_edge(placed, (kv, head, "", 0.0), _THINNEST, "feeds") for kv, head in _shared(nodes, names)],
        rows=rows,
        width=size[0],
        height=size[1],
        n_hidden=len(edges) - len(drawn),
    )  # fmt: skip


def _placed(names: list[str]) -> tuple[dict[str, Node], list[tuple[str, float]], tuple[float, float]]:
    """Return nodes by name, the title and height of each row, and the size of the drawing."""
    levels = sorted({_level(name) for name in names})
    members = {level: sorted((name for name in names if _level(name) == level), key=_number) for level in levels}
    widest = max((len(row) for row in members.values()), default=1)
    width = 2.0 * _MARGIN_X + max(widest - 1, 3) * _STEP_X
    step = _STEP_Y if len(levels) <= _MANY_ROWS else _DENSE_STEP_Y
    height = 2.0 * _MARGIN_Y + max(len(levels) - 1, 0) * step
    heights = {level: height - _MARGIN_Y - i * step for i, level in enumerate(levels)}
    middle = (width + _MARGIN_X / 2) / 2
    placed = {
        name: Node(name, _kind(name), middle + (i - (len(row) - 1) / 2) * _STEP_X, heights[level])
        for level, row in members.items()
        for i, name in enumerate(row)
    }
    return placed, [(_title(level), heights[level]) for level in levels], (width, height)


def draw(graph: LayeredGraph, axes: Axes) -> None:
    """Draw the graph with matplotlib."""
    axes.set_axis_off()
    axes.set_xlim(0, graph.width)
    axes.set_ylim(graph.height, 0)
    codes = [Curve.MOVETO, Curve.CURVE4, Curve.CURVE4, Curve.CURVE4]
    for edge in [*graph.feeds, *graph.edges]:
        color = _COLOURS[edge.part]
        style = ":" if edge.part == "feeds" else "-"
        curve = Curve(list(edge.curve), codes)
        axes.add_patch(PathPatch(curve, fill=False, edgecolor=color, lw=edge.width * 0.7, alpha=0.62, linestyle=style))
    for node in graph.nodes:
        corner = (node.x - NODE_WIDTH / 2 + 6, node.y - NODE_HEIGHT / 2 + 6)
        size = (NODE_WIDTH - 12, NODE_HEIGHT - 12)
        box = FancyBboxPatch(corner, *size, boxstyle="round,pad=6", fc="white", ec=MUTED, lw=0.9, zorder=3)
        axes.add_patch(box)
        # On a white box the ink must stay dark, also where the figure's other ink turns light.
        axes.text(node.x, node.y, node.name, ha="center", va="center", fontsize=7.5, color="#20242f", zorder=4)
    for title, y in graph.rows:
        axes.text(6, y, title, va="center", fontsize=7.5, color=MUTED if title else INK)


def _edge(placed: dict[str, Node], link: tuple[str, str, str, float], width: float, part: str) -> Edge:
    source, target, how, score = link
    start, end = placed[source], placed[target]
    x0, y0 = start.x, start.y - NODE_HEIGHT / 2
    x1, y1 = end.x + _ENTRY.get(how, 0), end.y + NODE_HEIGHT / 2
    bend = max((y0 - y1) * 0.45, 18.0)
    points = ((x0, y0), (x0, y0 - bend), (x1, y1 + bend), (x1, y1))
    return Edge(source, target, how, score, round(width, 2), points, part)


def _shared(nodes: pd.DataFrame, names: list[str]) -> list[tuple[str, str]]:
    """Return (shared key/value head, head) for heads of the drawing whose shared head is in it too."""
    if "kv_node" not in nodes:
        return []
    rows: Any = nodes[["node", "kv_node"]].dropna().itertuples(index=False, name=None)
    return [(kv, head) for head, kv in rows if head in names and kv in names]


def _level(name: str) -> tuple[int, int]:
    """Return where a node stands from below: the embedding; of each layer shared heads, heads, MLP; the logits."""
    match = _NODE.fullmatch(name)
    if match is None:
        return (_EMBED, 0) if name == "embed" else (_TOP, 0)
    return (int(match["layer"]), 2 if match["kind"] == "m" else 0 if match["part"] == "kv" else 1)


def _number(name: str) -> int:
    match = _NODE.fullmatch(name)
    return int(match["head"]) if match and match["head"] else 0


def _kind(name: str) -> str:
    match = _NODE.fullmatch(name)
    if match is None:
        return name if name in ("embed", "logits") else "other"
    return "mlp" if match["kind"] == "m" else "kv" if match["part"] == "kv" else "head"


def _title(level: tuple[int, int]) -> str:
    layer, part = level
    return "" if layer in (_EMBED, _TOP) else f"layer {layer}, {('k and v', 'heads', 'MLP')[part]}"
