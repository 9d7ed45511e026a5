"""The page of heads: classes with evidence, a heatmap of every score, attribution, attention and composition."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from mi_pipe.attention.head_scores import HeadScores
from mi_pipe.report.figures import Figure
from mi_pipe.report.head_evidence import evidence
from mi_pipe.report.heatmaps import heatmap
from mi_pipe.report.html import slug
from mi_pipe.report.naming import name_of
from mi_pipe.report.page import Page

_N_TOP = 10
_KEYS = ("layer", "head")
_LOSSES = {
    "first_half": "loss, random tokens",
    "second_half": "loss, the same again",
    "n_sequences": "sequences",
    "period": "tokens before they repeat",
}


def page(artifacts: Sequence[HeadScores]) -> Page:
    """Make the page of head scores."""
    sections = [_section(artifact, len(artifacts) > 1) for artifact in artifacts]
    return Page(
        context={"sections": [context for context, _, _ in sections]},
        figures=[figure for _, figures, _ in sections for figure in figures],
        tables={name: table for _, _, tables in sections for name, table in tables.items()},
    )


def score_names(table: pd.DataFrame) -> list[str]:
    """Return the columns of a score table that are scores."""
    return [str(column) for column in table.columns if column not in _KEYS and table[column].dtype.kind == "f"]


def strongest(table: pd.DataFrame, score: str, n: int = _N_TOP) -> list[dict[str, Any]]:
    """Return the `n` heads with the largest scores, as name and value; heads without one are left out."""
    top = table.dropna(subset=[score]).nlargest(n, score)
    return [
        {"name": f"{layer}.{head}", "layer": layer, "head": head, "value": value}
        for layer, head, value in zip(top["layer"], top["head"], top[score], strict=True)
    ]


def _section(
    artifact: HeadScores, is_one_of_many: bool
) -> tuple[dict[str, Any], list[Figure], dict[str, pd.DataFrame]]:
    table = artifact.read_table("scores.parquet")
    stem = slug(artifact.id)
    figures = [_heatmap(table, score, stem) for score in score_names(table)]
    context = {
        "name": name_of(artifact) if is_one_of_many else "",
        "slug": stem,
        "id": artifact.id,
        "loss": _loss_shown(artifact.read_json("loss.json")) if "loss.json" in artifact.manifest.files else {},
        "scores": [
            {"title": _title(score), "figure": figure.name, "top": strongest(table, score)}
            for score, figure in zip(score_names(table), figures, strict=True)
        ],
    }
    more = evidence(artifact)
    return {**context, **more.context}, [*figures, *more.figures], {f"scores-{stem}": table, **more.tables}


def _loss_shown(loss: Mapping[str, Any]) -> dict[str, Any]:
    """Return the losses on repeated random tokens by what they are of."""
    return {shown: loss[name] for name, shown in _LOSSES.items() if name in loss}


def _heatmap(table: pd.DataFrame, score: str, stem: str) -> Figure:
    grid = table.pivot_table(index="layer", columns="head", values=score, dropna=False, sort=True)
    values = grid.to_numpy(float)
    finite = values[np.isfinite(values)]
    lowest = float(finite.min(initial=0.0))
    best = strongest(table, score, 1)
    leader = f"; the largest is {best[0]['value']:.3f} at head {best[0]['name']}" if best else ""
    return heatmap(
        f"{slug(score)}-{stem}",
        _title(score),
        f"Heatmap of the {_title(score).lower()} score by layer and head{leader}.",
        values,
        [str(layer) for layer in grid.index],
        [str(head) for head in grid.columns],
        row_title="layer",
        column_title="head",
        value_title="score",
        diverging=lowest < 0 < float(finite.max(initial=0.0)),
        low=0.0 if lowest >= 0 else -1.0,
    )


def _title(score: str) -> str:
    words = score.replace("_", " ")
    return (words[0].upper() + words[1:]).replace("Ov ", "OV ").replace(" ov ", " OV ")
