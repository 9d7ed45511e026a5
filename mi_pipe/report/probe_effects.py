"""Figures of causal checks: what moving activations along a probe's direction does to the answer and later probes."""

import re
from collections.abc import Sequence

import numpy as np
import pandas as pd

from mi_pipe.probes.causal import PROBE
from mi_pipe.probes.probe_set import ProbeSet
from mi_pipe.report.figures import Figure, lines
from mi_pipe.report.heatmaps import heatmap

_BAND = ("low", "high")
_LINES = {True: "along the probe", False: "along a random direction"}
_STEP = "step, in deviations of the activations along the direction"


def with_sorts(names: Sequence[str], hooks: Sequence[str]) -> list[str]:
    """Return names of lines by layer, with the sort of hook point where there are several.

    >>> with_sorts(["linear"] * 2, ["blocks.0.hook_resid_post", "blocks.0.hook_mlp_out"])
    ['linear of hook_resid_post', 'linear of hook_mlp_out']
    """
    sorts = [re.sub(r"^blocks\.\d+\.", "", hook) for hook in hooks]
    if len(set(sorts)) == 1:
        return list(names)
    return [f"{name} of {sort}" for name, sort in zip(names, sorts, strict=True)]


def short(hook: str) -> str:
    """Return a hook point's name for the edge of a map.

    >>> short("blocks.3.hook_resid_post"), short("blocks.0.attn.hook_z"), short("mine")
    ('3.resid_post', '0.attn.z', 'mine')
    """
    return hook.removeprefix("blocks.").replace("hook_", "")


def effects(found: ProbeSet, label: str, best: pd.DataFrame, stem: str) -> list[Figure]:
    """Draw the causal check of a label at the position of its best linear probe (a row of `best`)."""
    chosen = best.loc[best["validation"].idxmax()]
    hook, position = str(chosen["hook"]), str(chosen["position"])
    table = found.table().query("label == @label and position == @position and kind == 'linear'")
    moved: pd.DataFrame = pd.concat(
        found.causal_effects(label, name, position).assign(hook=name, layer=layer)
        for name, layer in zip(table["hook"], table["layer"], strict=True)
    )
    metric = "metric" if np.isfinite(moved["metric"].to_numpy(float)).any() else "reading"
    name = found.metric if metric == "metric" else "reading of the last probe"
    drawn = [
        _by_amount(moved.loc[moved["hook"] == hook], metric, name, hook, position, stem),
        _by_hook(moved, metric, name, position, stem),
    ]
    hooks = table["hook"].tolist()
    return drawn if len(hooks) == 1 else [*drawn, _carried(moved, hooks, position, stem)]


def _largest(moved: pd.DataFrame) -> float:
    """Return the largest step, the positive one of two."""
    return max(moved["amount"].to_numpy(float).tolist(), key=lambda amount: (abs(amount), amount))


def _at_end(moved: pd.DataFrame) -> pd.DataFrame:
    """Return one row a run: that of the last hook point that was read (the metric is the same in all)."""
    return moved.drop_duplicates(["hook", "direction", "amount"], keep="last")


def _named(moved: pd.DataFrame, metric: str) -> pd.DataFrame:
    names = {"value": metric, "low": f"{metric}_low", "high": f"{metric}_high"}
    ordered = moved.sort_values("direction", key=lambda names: names != PROBE, kind="stable")
    kept = ordered.assign(direction=[_LINES[name == PROBE] for name in ordered["direction"]])
    return kept.assign(**{name: kept[column] for name, column in names.items()})


def _by_amount(moved: pd.DataFrame, metric: str, name: str, hook: str, position: str, stem: str) -> Figure:
    found = _named(_at_end(moved), metric)
    alone = pd.DataFrame({"direction": list(_LINES.values()), "amount": 0.0, "value": 0.0, "low": 0.0, "high": 0.0})
    columns = ["direction", "amount", "value", *_BAND]
    whole: pd.DataFrame = pd.concat([found.loc[:, columns], alone])
    frame = whole.sort_values("amount", kind="stable", ignore_index=True)
    most = _largest(found)
    end = found.loc[found["amount"] == most].set_index("direction")["value"]
    return lines(
        f"moved-{stem}",
        f"Change of {name} when activations are moved",
        f"Lines of the change of {name} by step at {hook}, {position}; at {most:g} deviations {end[_LINES[True]]:.3g} "
        f"along the probe and {end[_LINES[False]]:.3g} along a random direction.",
        frame, "amount", "value", by="direction", band=_BAND, markers=True, x_title=_STEP, y_title=f"change of {name}",
        caption=f"At {hook}, {position}; bands: 95% by prompt.",
    )  # fmt: skip


def _by_hook(moved: pd.DataFrame, metric: str, name: str, position: str, stem: str) -> Figure:
    """Draw the change at the largest step by layer."""
    ends = _named(_at_end(moved), metric)
    most = _largest(ends)
    chosen: pd.DataFrame = ends.loc[ends["amount"] == most]
    frame = chosen.reset_index(drop=True)
    top = frame.loc[frame["value"].abs().idxmax()]
    frame = frame.assign(direction=with_sorts(frame["direction"].tolist(), frame["hook"].tolist()))
    return lines(
        f"moved-layers-{stem}",
        f"Change of {name} by layer, {most:g} deviations",
        f"Lines of the change of {name} by the layer that is moved; the largest is {top['value']:.3g} at "
        f"{top['hook']}.",
        frame, "layer", "value", by="direction", band=_BAND, keep=("hook",), whole_x=True, markers=True,
        x_title="layer that is moved", y_title=f"change of {name}",
        caption=f"Position {position}; bands: 95% by prompt.",
    )  # fmt: skip


def _carried(moved: pd.DataFrame, hooks: list[str], position: str, stem: str) -> Figure:
    """Draw how much of a move later probes of the same label read, in units of their own largest change."""
    most = _largest(moved)
    chosen = moved.loc[(moved["amount"] == most) & (moved["direction"] == PROBE)]
    grid = chosen.pivot_table(index="hook", columns="read_hook", values="reading").reindex(index=hooks, columns=hooks)
    own = np.diag(grid.to_numpy())
    values = grid.to_numpy() / own[None, :]
    names = [short(hook) for hook in hooks]
    return heatmap(
        f"carried-{stem}",
        "How later probes read the move",
        f"Heatmap of the change of later probes' readings after a move of {most:g} deviations at an earlier hook "
        "point, as a fraction of what a move of their own does.",
        values, names, names, row_title="moved at", column_title="read at", value_title="fraction of an own move",
        diverging=True, caption=f"Position {position}. 1 is what moving the reading probe's own hook point does.",
    )  # fmt: skip
