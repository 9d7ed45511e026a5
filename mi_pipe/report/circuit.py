"""The page of circuits: each circuit as a layered graph, and its faithfulness against random circuits."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from mi_pipe.core.artifact import Artifact
from mi_pipe.report.figures import Figure
from mi_pipe.report.html import slug
from mi_pipe.report.layered import LayeredGraph, by_strength, draw, layered_graph
from mi_pipe.report.naming import name_of
from mi_pipe.report.page import Page
from mi_pipe.report.style import GRID, MUTED, SERIES, log_scale

_N_STRONGEST = 20
_SHOWN = ["source", "target", "score", "standard_error", "in_circuit"]
_PIXELS_AN_INCH = 96
_MAX_INCHES = 60.0


def page(artifacts: Sequence[Artifact]) -> Page:
    """Make the page of circuits."""
    sections, figures, tables = [], [], {}
    for artifact in artifacts:
        stem, edges = slug(artifact.id), artifact.read_table("edges.parquet")
        nodes = artifact.read_table("nodes.parquet")
        circuit = edges.loc[edges["in_circuit"].to_numpy()]
        helping_sign = -1.0 if artifact.read_json("circuit.json").get("direction") == "noising" else 1.0
        graph = layered_graph(circuit, nodes, helping_sign)
        drawing, curve = _drawing(graph, circuit, stem), _faithfulness(artifact, stem)
        sections.append(
            {
                "name": name_of(artifact),
                "id": artifact.id,
                "slug": stem,
                "summary": artifact.summary,
                "graph": graph,
                "helping_sign": helping_sign,
                "edges": [_shown(edge) for edge in graph.edges],
                "drawing": drawing.name,
                "curve": curve.name,
                "strongest": _strongest(edges),
            }
        )
        figures += [drawing, curve]
        tables |= {f"all-edges-{stem}": edges, f"nodes-{stem}": nodes}
    return Page(context={"sections": sections}, figures=figures, tables=tables)


def _shown(edge: Any) -> dict[str, Any]:
    """Return what the page's script says of an edge."""
    return {"source": edge.source, "target": edge.target, "how": edge.how, "score": edge.score, "part": edge.part}


def _strongest(edges: pd.DataFrame) -> pd.DataFrame:
    shown = [column for column in _SHOWN if column in edges]
    return by_strength(edges).head(_N_STRONGEST).loc[:, shown]


def _drawing(graph: LayeredGraph, circuit: pd.DataFrame, stem: str) -> Figure:
    inches = (min(graph.width / _PIXELS_AN_INCH, _MAX_INCHES), min(graph.height / _PIXELS_AN_INCH, _MAX_INCHES))
    return Figure(
        f"circuit-{stem}",
        "The circuit",
        f"Layered graph of {len(graph.nodes)} nodes and {len(graph.edges)} edges, from embedding to logits.",
        circuit,
        lambda axes: draw(graph, axes),
        size=inches,
    )


def _faithfulness(artifact: Artifact, stem: str) -> Figure:
    table = artifact.read_table("faithfulness.parquet")
    chosen = float(artifact.summary.get("faithfulness") or np.nan)
    away = np.abs(table["faithfulness"].to_numpy(float) - chosen)

    def plot(axes: Axes) -> None:
        axes.axhline(1, color=GRID, linewidth=1.2)
        axes.axhline(0, color=GRID, linewidth=1.2)
        if {"low", "high"} <= set(table.columns):
            axes.fill_between(table["n_edges"], table["low"], table["high"], color=SERIES[0], alpha=0.16, linewidth=0)
        axes.plot(table["n_edges"], table["faithfulness"], color=SERIES[0], marker="o", markersize=4, label="circuit")
        if "random_faithfulness" in table:
            axes.plot(
                table["n_edges"], table["random_faithfulness"], color=MUTED, marker="s", markersize=3.5,
                linestyle="--", label="random edges",
            )  # fmt: skip
        if np.isfinite(away).any():
            best = table.iloc[int(np.nanargmin(away))]
            axes.scatter(
                [best["n_edges"]], [best["faithfulness"]], s=150, facecolors="none", edgecolors=SERIES[1],
                linewidths=2, zorder=5, label="the circuit above",
            )  # fmt: skip
        log_scale(axes, "x")
        axes.set_xlabel("edges kept")
        axes.set_ylabel("faithfulness")
        axes.tick_params(length=0)
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1.01), ncols=3)

    reached = table["faithfulness"].max()
    return Figure(
        f"faithfulness-{stem}",
        "Faithfulness",
        f"Line chart of faithfulness against edges kept, and of random circuits; at most {reached:.3g}.",
        table,
        plot,
        "(metric - corrupted) / (clean - corrupted); 1 is the whole model. The band is the 95% interval over pairs.",
    )
