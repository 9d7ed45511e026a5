"""What heads do beyond scores: classes with evidence, logit attribution, attention between places, composition."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from mi_pipe.attention.head_scores import CLASSES_FILE, COMPOSITION_FOLDER, HeadScores
from mi_pipe.report.figures import Figure, bars
from mi_pipe.report.heatmaps import heatmap
from mi_pipe.report.html import slug

_N_PAIRS = 12
_DECIMALS = 3
_N_COMPONENTS = 20
_SHOWN_PLACES = (("end", "io"), ("end", "s2"), ("s2", "s1"))
_KINDS = {"q": "query", "k": "key", "v": "value"}


@dataclass
class Evidence:
    """A part of the page: its figures by name, and its tables."""

    figures: list[Figure] = field(default_factory=list)
    tables: dict[str, pd.DataFrame] = field(default_factory=dict)
    context: dict[str, Any] = field(default_factory=dict)


def evidence(artifact: HeadScores) -> Evidence:
    """Return what there is; artifacts of the stage's first version have none of it."""
    found = Evidence()
    found.context = {"classes": None, "tasks": [], "composition": None, "refused": {}}
    if CLASSES_FILE in artifact.manifest.files:
        found.context |= {
            "classes": classes_shown(artifact.classes(), artifact.criteria),
            "refused": artifact.refused,
        }
        found.tables[f"classes-{slug(artifact.id)}"] = artifact.classes()
    for task in artifact.attended_tasks:
        _add_task(found, artifact, task)
    if any(name.startswith(f"{COMPOSITION_FOLDER}/") for name in artifact.manifest.files):
        _add_composition(found, artifact)
    return found


def classes_shown(classes: pd.DataFrame, criteria: Mapping[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Return each class that a head is of or nearly so: its `name`, its `rules` in words, and a table of the heads.

    The table has `head` ("18.6"), `is it` ("yes", or "nearly" for a candidate) and the evidence that the class asks
    for, members first, each by the first piece of evidence.
    """
    found = []
    for name, rules in criteria.items():
        is_member, is_near = (_lists(classes, column, name) for column in ("classes", "candidate_for"))
        evidence_of = [str(rule["evidence"]) for rule in rules]
        table = classes.loc[is_member | is_near, ["layer", "head", *evidence_of]].round(_DECIMALS)
        table.insert(0, "is it", np.where(is_member[is_member | is_near], "yes", "nearly"))
        descends = rules[0]["threshold"] >= 0
        table = table.sort_values(["is it", evidence_of[0]], ascending=[False, not descends], kind="stable")
        table.insert(0, "name", [f"{layer}.{head}" for layer, head in zip(table["layer"], table["head"], strict=True)])
        shown = table.drop(columns=["layer", "head"]).rename(columns={"name": "head"})
        if len(shown):
            found.append({"name": name.replace("_", " "), "rules": _spelled(rules), "heads": shown})
    return found


def strongest_pairs(scores: xr.DataArray, n: int = _N_PAIRS) -> pd.DataFrame:
    """Return the pairs of heads with the largest score of one kind: `earlier`, `later`, `score`."""
    values = scores.to_numpy()
    order = np.argsort(np.where(np.isfinite(values), -values, np.inf), axis=None)[:n]
    earlier_layer, earlier, later_layer, later = np.unravel_index(order, values.shape)
    return pd.DataFrame(
        {
            "earlier": [f"{a}.{b}" for a, b in zip(earlier_layer, earlier, strict=True)],
            "later": [f"{a}.{b}" for a, b in zip(later_layer, later, strict=True)],
            "score": values.ravel()[order],
        }
    ).dropna()


def components(attribution: xr.Dataset) -> pd.DataFrame:
    """Return the mean contribution of every component to the logit difference, the largest in absolute value first."""
    means = attribution.mean("pair")
    rows = [(name, float(means[name])) for name in ("embed", "pos_embed", "bias")]
    for layer in range(means.sizes["layer"]):
        rows += [(f"{layer}.{head}", float(value)) for head, value in enumerate(means["heads"][layer].to_numpy())]
        rows += [(f"MLP {layer}", float(means["mlps"][layer])), (f"{layer} bias", float(means["attn_bias"][layer]))]
    table = pd.DataFrame(rows, columns=["component", "contribution"])
    return table.sort_values("contribution", key=abs, ascending=False, kind="stable").reset_index(drop=True)


def _lists(classes: pd.DataFrame, column: str, name: str) -> np.ndarray:
    return np.array([name in str(names).split(", ") for names in classes[column].to_numpy()], dtype=bool)


def _spelled(rules: list[dict[str, Any]]) -> str:
    parts = [
        f"{str(rule['evidence']).replace('_', ' ')} {'≥' if rule['threshold'] >= 0 else '≤'} {rule['threshold']:g}"
        for rule in rules
    ]
    return ", ".join(parts)


def _add_task(found: Evidence, artifact: HeadScores, task: str) -> None:
    stem = f"{slug(task)}-{slug(artifact.id)}"
    attention, figures = artifact.attention(task), []
    for query, key in _SHOWN_PLACES if "places" in attention else ():
        if {query, key} <= set(attention.attrs["place"]):
            cells = attention["places"].sel({"from": query, "to": key}).mean("pair").to_numpy()
            title = f"Attention from {query} to {key}: {task}"
            figures.append(_by_head(f"place-{query}-{key}-{stem}", title, cells, "attention", low=0.0))
    shown: dict[str, Any] = {"name": task, "places": [figure.name for figure in figures], "attribution": []}
    if task in artifact.attributed_tasks:
        attribution = artifact.attribution(task)
        drawn = _attribution_figures(attribution, task, stem)
        shown["attribution"] = [figure.name for figure in drawn]
        shown["logit_diff"] = float(attribution["logit_diff"].mean())
        found.tables[f"attribution-{stem}"] = components(attribution)
        shown["table"] = f"attribution-{stem}"
        figures += drawn
    found.figures += figures
    found.context["tasks"].append(shown)


def _attribution_figures(attribution: xr.Dataset, task: str, stem: str) -> list[Figure]:
    cells = attribution["heads"].mean("pair").to_numpy()
    title = f"Direct logit attribution of heads: {task}"
    top = components(attribution).head(_N_COMPONENTS)
    strongest = f"{top['component'][0]} with {top['contribution'][0]:.2f}"
    return [
        _by_head(f"attribution-{stem}", title, cells, "logit difference", diverging=True),
        bars(
            f"components-{stem}",
            f"Largest components: {task}",
            f"Bars of the {len(top)} largest mean contributions to the logit difference; the largest is {strongest}.",
            top,
            "component",
            "contribution",
            x_title="contribution to the logit difference",
        ),
    ]


def _add_composition(found: Evidence, artifact: HeadScores) -> None:
    scores = artifact.composition()
    stem, kinds = slug(artifact.id), []
    layers = [str(layer) for layer in range(scores.sizes["layer"])]
    # In this order: a group lists its arrays in the order in which a disk does.
    for kind in [kind for kind in _KINDS if kind in scores["kind"].to_numpy()]:
        of_kind = scores.sel(kind=kind)
        cells = of_kind.max(("head", "later_head")).to_numpy()
        title = f"{_KINDS[kind].capitalize()} composition of layers"
        figure = heatmap(
            f"composition-{kind}-{stem}",
            title,
            f"Heatmap of the largest {_KINDS[kind]} composition between heads of an earlier and a later layer.",
            cells,
            layers,
            layers,
            row_title="earlier layer",
            column_title="later layer",
            value_title="largest score",
            low=0.0,
        )
        found.figures.append(figure)
        kinds.append({"title": title, "figure": figure.name, "pairs": strongest_pairs(of_kind)})
    found.context["composition"] = {"kinds": kinds, "random_mean": scores.attrs.get("random_mean")}


def _by_head(name: str, title: str, cells: np.ndarray, value_title: str, **options: Any) -> Figure:
    layer, head = np.unravel_index(int(np.nanargmax(np.abs(cells))), cells.shape)
    return heatmap(
        name,
        title,
        f"Heatmap of {title[0].lower()}{title[1:]}, by layer and head; the largest is {cells[layer, head]:.2f} at head "
        f"{layer}.{head}.",
        cells,
        [str(row) for row in range(cells.shape[0])],
        [str(column) for column in range(cells.shape[1])],
        row_title="layer",
        column_title="head",
        value_title=value_title,
        **options,
    )
