"""The page of probes: how well labels are read by layer, beside control tasks, and what moving activations does."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from mi_pipe.probes.probe_set import ProbeSet
from mi_pipe.report.figures import Figure, lines
from mi_pipe.report.heatmaps import heatmap
from mi_pipe.report.html import slug
from mi_pipe.report.naming import name_of
from mi_pipe.report.page import Page
from mi_pipe.report.probe_effects import effects, short, with_sorts

_BAND = ("low", "high")
_MAX_POSITIONS = 4
_MAPS = ("test", "control", "selectivity")
_KINDS = {"linear": "linear", "mlp": "MLP"}
_BEST = [
    "position", "kind", "hook", "l2", "test", "low", "high", "auc", "control", "selectivity", "selectivity_low",
    "selectivity_high", "types_seen", "n_classes", "n_training", "n_test",
]  # fmt: skip


def page(artifacts: Sequence[ProbeSet]) -> Page:
    """Make the page of probes."""
    sections, figures, tables = [], [], {}
    for found in artifacts:
        stem = slug(found.id)
        labels = [_label(found, label, f"{number}-{stem}") for number, label in enumerate(found.labels)]
        figures += [figure for _, drawn in labels for figure in drawn]
        tables[f"probes-{stem}"] = found.table()
        sections.append(
            {
                "name": name_of(found),
                "id": found.id,
                "slug": stem,
                "summary": found.summary,
                "labels": [context for context, _ in labels],
                "skipped": found.skipped,
            }
        )
    return Page(context={"sections": sections}, figures=figures, tables=tables)


def best_probes(table: pd.DataFrame) -> pd.DataFrame:
    """Return the probe of each position and kind that validation rows like best: a choice that test rows do not see."""
    known = table.loc[np.isfinite(table["validation"].to_numpy(float))]
    chosen = [rows["validation"].idxmax() for _, rows in known.groupby(["position", "kind"], sort=False)]
    return known.loc[chosen]


def _label(found: ProbeSet, label: str, stem: str) -> tuple[dict[str, Any], list[Figure]]:
    table = found.table().query("label == @label")
    figure = "accuracy" if table["n_classes"].to_numpy()[0] else "R²"
    positions = list(dict.fromkeys(table["position"]))
    curves = [
        _by_layer(table.loc[table["position"] == position], position, figure, f"{number}-{stem}")
        for number, position in enumerate(positions[:_MAX_POSITIONS])
    ]
    maps = [_maps(found, label, kind, figure, stem) for kind in dict.fromkeys(table["kind"])] if positions[1:] else []
    best = best_probes(table)
    penalties = [_penalties(found, best, stem)] if len(best) else []
    linear = best.loc[best["kind"] == "linear"]
    moved = effects(found, label, linear, stem) if found.has_causal and len(linear) else []
    context = {
        "name": label,
        "figure": figure,
        "curves": [item.name for item in curves],
        "n_more": len(positions) - len(curves),
        "maps": [[item.name for item in kind] for kind in maps],
        "best": best[_BEST].drop(columns=[] if figure == "accuracy" else ["auc", "n_classes"]),
        "penalties": [item.name for item in penalties],
        "effects": [item.name for item in moved],
    }
    return context, [*curves, *(item for kind in maps for item in kind), *penalties, *moved]


def _by_layer(table: pd.DataFrame, position: str, figure: str, stem: str) -> Figure:
    """Draw each kind of probe and its control task by layer, and how well the commonest class would do."""
    kinds = [_KINDS[kind] for kind in table["kind"]]
    names = pd.Series(with_sorts(kinds, table["hook"].tolist()), table.index)
    parts = [_series(table, names, "test", "low", "high")]
    parts.append(_series(table, names + ", control", "control", "control_low", "control_high"))
    if figure == "accuracy":
        common = table.drop_duplicates("layer").sort_values("layer")
        parts.append(_series(common, pd.Series("commonest class", common.index), "majority", "majority", "majority"))
    frame = pd.concat(parts, ignore_index=True)
    frame = frame.loc[np.isfinite(frame["value"].to_numpy(float))]
    top = table.loc[table["test"].idxmax()]
    return lines(
        f"test-{stem}",
        f"Position {position}: {figure} on test prompts",
        f"Lines of {figure} by layer; the highest is {top['test']:.3g} at {top['hook']} by a {top['kind']} probe.",
        frame, "layer", "value", by="probe", band=_BAND, whole_x=True, markers=True, x_title="layer", y_title=figure,
        controls={f"{name}, control": name for name in names},
        caption="Bands: 95% by prompt. Dashed: the control task, random labels for each type (Hewitt and Liang 2019).",
    )  # fmt: skip


def _series(table: pd.DataFrame, names: pd.Series, value: str, low: str, high: str) -> pd.DataFrame:
    columns = {"value": table[value], "low": table[low], "high": table[high]}
    return pd.DataFrame({"probe": names, "layer": table["layer"], **columns}).sort_values(
        ["probe", "layer"], kind="stable"
    )


def _maps(found: ProbeSet, label: str, kind: str, figure: str, stem: str) -> list[Figure]:
    """Draw one kind's figures by hook point and position."""
    drawn = []
    for name in _MAPS:
        grid = found.grid(name, label, kind)
        values = grid.to_numpy()
        if not np.isfinite(values).any():
            continue
        place = np.unravel_index(int(np.nan_to_num(values, nan=-np.inf).argmax()), values.shape)
        hooks, positions = grid["hook"].values.tolist(), grid["position"].values.tolist()
        unit = {"test": figure, "control": f"{figure} of the control"}.get(name, name)
        drawn.append(
            heatmap(
                f"{name}-{kind}-{stem}",
                f"By hook point and position, {_KINDS[kind]} probes",
                f"Heatmap of {unit} by hook point and position; the largest is {values[place]:.3g} at "
                f"{hooks[place[0]]}, {positions[place[1]]}.",
                values, [short(hook) for hook in hooks], positions, row_title="hook point", column_title="position",
                value_title=unit, diverging=name == "selectivity",
            )
        )  # fmt: skip
    return drawn


def _penalties(found: ProbeSet, best: pd.DataFrame, stem: str) -> Figure:
    """Draw the loss on training and validation rows by L2, of the real labels and of the control's."""
    first = best.loc[best["validation"].idxmax()]
    curve = found.curves.loc[found.curves["probe"] == first["probe"]]
    parts = [
        pd.DataFrame({"rows": part + (", control" if is_control else ""), "l2": rows["l2"], "loss": rows[part]})
        for is_control, rows in curve.groupby("control")
        for part in ("training", "validation")
    ]
    unit = "loss, nats" if first["n_classes"] else "mean squared error"
    return lines(
        f"l2-{stem}",
        "Choice of L2, best probe",
        f"Lines of {unit} on training and validation rows by penalty; chosen is {first['l2']:g}.",
        pd.concat(parts, ignore_index=True), "l2", "loss", by="rows", log_x=True, markers=True, x_title="L2",
        controls={f"{part}, control": part for part in ("training", "validation")},
        y_title=unit,
        caption=f"{_KINDS[first['kind']]} probe at {first['hook']}, {first['position']}: {first['l2']:g} chosen. "
        "Dashed: the control task.",
    )  # fmt: skip
