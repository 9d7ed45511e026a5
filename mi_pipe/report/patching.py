"""The page of activation patching: how much of the metric each patch restores, or destroys, by layer and part.

Pairs of one length are shown together, under the tokens of their first clean prompt; every length has its own
heatmaps, the one with most pairs first. Each heatmap is there as fraction and as the metric's change. Of
units by part and position, each part is shown at the position where it does most.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import Float

from mi_pipe.patching.effects import PatchEffects
from mi_pipe.patching.units import BY_POS
from mi_pipe.report.figures import Figure, histogram
from mi_pipe.report.heatmaps import heatmap
from mi_pipe.report.html import slug
from mi_pipe.report.naming import name_of
from mi_pipe.report.page import Page

_MAX_LENGTHS = 4
_LOGIT_DIFF = "logit_diff"
_TITLES = {
    "embed": "Embeddings",
    "resid_pre": "Residual stream before each layer",
    "resid_mid": "Residual stream between attention and MLP",
    "resid_post": "Residual stream after each layer",
    "attn_out": "Attention output",
    "mlp_out": "MLP output",
    "head_out": "Output of each head",
    "q": "Queries of each head",
    "k": "Keys of each key/value head",
    "v": "Values of each key/value head",
    "pattern": "Attention pattern of each head",
    "neuron": "Chosen neurons",
    "sae_feature": "Chosen SAE features",
    "sae_error": "SAE error",
}
_FRACTIONS = {"denoising": "fraction recovered", "noising": "fraction lost"}
_PARTS = {"head": "head", "kv_head": "key/value head", "neuron": "chosen neuron", "feature": "chosen feature"}


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
    by_pos = [unit for unit in effects.units if "pos" in effects.effects(unit).dims]
    heads = [_heatmap(effects, unit, None, stem) for unit in effects.units if unit not in by_pos]
    groups, figures = [], [figure for pair in heads for figure in pair]
    for n_pos, n_pairs in lengths.items() if by_pos else ():
        drawn = [_heatmap(effects, unit, int(str(n_pos)), stem) for unit in by_pos]
        groups.append({"n_pos": n_pos, "n_pairs": n_pairs, "figures": _names(drawn)})
        figures += [figure for pair in drawn for figure in pair]
    base = _base_runs(effects, stem)
    section = {
        "name": name_of(effects),
        "id": effects.id,
        "slug": stem,
        "direction": effects.direction,
        "intervention": effects.to_xarray().attrs.get("intervention", "patch"),
        "summary": effects.summary,
        "groups": groups,
        "n_more": effects.pairs["n_pos"].nunique() - len(lengths) if by_pos else 0,
        "heads": _names(heads),
        "pairs": effects.pairs,
        "base": base.name,
    }
    return section, [*figures, base]


def _names(pairs: Sequence[tuple[Figure, Figure]]) -> list[tuple[str, str]]:
    return [(fraction.name, metric.name) for fraction, metric in pairs]


def _heatmap(effects: PatchEffects, unit: str, n_pos: int | None, stem: str) -> tuple[Figure, Figure]:
    """Return the heatmaps of one unit: recovered (or lost) fraction, and the metric's change against the base run."""
    runs = effects.to_xarray()
    base = runs["corrupted" if effects.direction == "denoising" else "clean"]
    fractions, changes = effects.recovered(unit, n_pos), (effects.effects(unit, n_pos) - base).mean("pair")
    strongest = _strongest_position(fractions)
    fraction, change = (_plane(values, strongest) for values in (fractions, changes))
    part = next((str(axis) for axis in fractions.dims if axis in _PARTS), None)
    columns = [str(i) for i in range(fraction.shape[1])] if part else ["all positions"]
    if part is None and "pos" in fractions.dims:
        columns = effects.labels(n_pos)
    layers = [str(layer) for layer in range(len(fraction))] if "layer" in fractions.dims else ["embeddings"]
    share, leader = _FRACTIONS[effects.direction], _leader(fraction, layers, columns)
    title = _title(unit, part is not None, "pos" in fractions.dims)
    size = f"{n_pos}-{stem}" if n_pos is not None else stem
    column_title = _PARTS[part] if part else "token" if "pos" in fractions.dims else ""
    titles = {"row_title": "layer", "column_title": column_title, "diverging": True}
    what = _metric_name(effects)
    return (
        heatmap(
            f"{unit}-{size}", title, f"Heatmap of the {share} by patching, {title}; {leader}.",
            fraction, layers, columns, value_title=share, **titles,
        ),
        heatmap(
            f"{unit}-metric-{size}", title, f"Heatmap of the change of the {what} by patching, {title}.",
            change, layers, columns, value_title=f"change of {what}", **titles,
        ),
    )  # fmt: skip


def _leader(fraction: Float[np.ndarray, "layer column"], layers: Sequence[str], columns: Sequence[str]) -> str:
    if not np.isfinite(fraction).any():
        return "the two runs do not differ"
    layer, column = divmod(int(np.nan_to_num(np.abs(fraction), nan=-1.0).argmax()), len(columns))
    return f"the largest is {fraction[layer, column]:.3f} at layer {layers[layer]}, {columns[column]!r}"


def _title(unit: str, has_part: bool, has_pos: bool) -> str:
    name = _TITLES.get(unit.removesuffix(BY_POS), unit)
    if not has_pos:
        return f"{name}, all positions"
    return f"{name}, at the position where it does most" if has_part else name


def _metric_name(effects: PatchEffects) -> str:
    metric = str(effects.to_xarray().attrs.get("metric", _LOGIT_DIFF))
    return {_LOGIT_DIFF: "logit difference", "prob_diff": "probability difference", "kl": "KL"}.get(metric, metric)


def _strongest_position(fractions: xr.DataArray) -> xr.DataArray | None:
    """Return where each part of a layer has its largest fraction; None where positions are all that is shown."""
    if "pos" not in fractions.dims or not any(axis in _PARTS for axis in fractions.dims):
        return None
    return abs(fractions).fillna(-1.0).argmax("pos")


def _plane(values: xr.DataArray, strongest: xr.DataArray | None) -> Float[np.ndarray, "layer column"]:
    array = (values if strongest is None else values.isel(pos=strongest)).to_numpy()
    array = array if "layer" in values.dims else array[None]
    return array if array.ndim > 1 else array[:, None]


def _base_runs(effects: PatchEffects, stem: str) -> Figure:
    values = {run: effects.pairs[run].to_numpy(float) for run in ("clean", "corrupted")}
    clean, corrupted = (found.mean() for found in values.values())
    what = _metric_name(effects)
    is_logit_diff = what == "logit difference"
    return histogram(
        f"base-{stem}",
        f"{what[0].upper()}{what[1:]} without patching",
        f"Histogram of the {what} over pairs; the mean is {clean:.3g} clean and {corrupted:.3g} corrupted.",
        values,
        n_bins=24,
        x_title="logit of the answer minus logit of the wrong token" if is_logit_diff else what,
        y_title="pairs",
    )
