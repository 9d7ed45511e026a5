"""The page of activation patching: how much of the metric each patch restores, by layer and position or head.

Pairs of one length are shown together, under the tokens of their first clean prompt; every length has its own
heatmaps, the one with most pairs first. Each heatmap is there as recovered fraction and as logit difference.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from mi_pipe.patching.effects import PatchEffects
from mi_pipe.report.figures import Figure, histogram
from mi_pipe.report.heatmaps import heatmap
from mi_pipe.report.html import slug
from mi_pipe.report.naming import name_of
from mi_pipe.report.page import Page

_MAX_LENGTHS = 4
_TITLES = {
    "resid_pre": "Residual stream before each layer",
    "attn_out": "Attention output",
    "mlp_out": "MLP output",
    "head_out": "Output of each head, all positions",
}


def page(artifacts: Sequence[PatchEffects]) -> Page:
    """Make the page of one or more patched tasks."""
    sections, figures = [], []
    for effects in artifacts:
        section, drawn = _section(effects)
        sections.append(section)
        figures += drawn
    tables = {f"pairs-{section['slug']}": section["pairs"].drop(columns="labels") for section in sections}
    return Page(context={"sections": sections}, figures=figures, tables=tables)


def _section(effects: PatchEffects) -> tuple[dict[str, Any], list[Figure]]:
    stem = slug(effects.id)
    lengths = effects.pairs["n_pos"].value_counts(sort=True).head(_MAX_LENGTHS)
    heads = [_heatmap(effects, "head_out", None, stem)] if "head_out" in effects.units else []
    groups, figures = [], [figure for pair in heads for figure in pair]
    for n_pos, n_pairs in lengths.items():
        drawn = [_heatmap(effects, unit, int(str(n_pos)), stem) for unit in effects.units if unit != "head_out"]
        groups.append({"n_pos": n_pos, "n_pairs": n_pairs, "figures": _names(drawn)})
        figures += [figure for pair in drawn for figure in pair]
    base = _base_runs(effects, stem)
    section = {
        "name": name_of(effects),
        "id": effects.id,
        "slug": stem,
        "direction": effects.direction,
        "summary": effects.summary,
        "groups": groups,
        "n_more": effects.pairs["n_pos"].nunique() - len(lengths),
        "heads": _names(heads),
        "pairs": effects.pairs,
        "base": base.name,
    }
    return section, [*figures, base]


def _names(pairs: Sequence[tuple[Figure, Figure]]) -> list[tuple[str, str]]:
    return [(fraction.name, metric.name) for fraction, metric in pairs]


def _heatmap(effects: PatchEffects, unit: str, n_pos: int | None, stem: str) -> tuple[Figure, Figure]:
    """Return the heatmaps of one unit: recovered fraction, and the metric's change against the base run."""
    fraction = effects.recovered(unit, n_pos).to_numpy()
    runs = effects.to_xarray()
    base = runs["corrupted" if effects.direction == "denoising" else "clean"]
    change = (effects.effects(unit, n_pos) - base).mean("pair").to_numpy()
    n_layers, n_columns = fraction.shape
    columns = [str(head) for head in range(n_columns)] if unit == "head_out" else effects.labels(n_pos)
    size = f"{n_pos}-{stem}" if n_pos is not None else stem
    place = np.unravel_index(int(np.nan_to_num(np.abs(fraction), nan=-1.0).argmax()), fraction.shape)
    leader = f"the largest is {fraction[place]:.3f} at layer {place[0]}, {columns[place[1]]!r}"
    titles = {"row_title": "layer", "column_title": "head" if unit == "head_out" else "token", "diverging": True}
    layers = [str(layer) for layer in range(n_layers)]
    title = _TITLES.get(unit, unit)
    return (
        heatmap(
            f"{unit}-{size}", title, f"Heatmap of the fraction recovered by patching, {title}; {leader}.",
            fraction, layers, columns, value_title="fraction recovered", **titles,
        ),
        heatmap(
            f"{unit}-metric-{size}", title, f"Heatmap of the change of the logit difference by patching, {title}.",
            change, layers, columns, value_title="change of logit difference", **titles,
        ),
    )  # fmt: skip


def _base_runs(effects: PatchEffects, stem: str) -> Figure:
    values = {run: effects.pairs[run].to_numpy(float) for run in ("clean", "corrupted")}
    clean, corrupted = (found.mean() for found in values.values())
    return histogram(
        f"base-{stem}",
        "Logit difference without patching",
        f"Histogram of the logit difference over pairs; the mean is {clean:.3g} clean and {corrupted:.3g} corrupted.",
        values,
        n_bins=24,
        x_title="logit of the answer minus logit of the wrong token",
        y_title="pairs",
    )
