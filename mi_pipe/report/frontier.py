"""The trade of sparsity against quality: SAEs as points, those that differ in sparsity alone joined to a line.

Lower left is better for FVU and KL, upper left for cross-entropy recovered. Where a sweep has several architectures,
widths or places, each has a line of its own, named by what tells it from the others.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from mi_pipe.core.artifact import Artifact
from mi_pipe.report.figures import Figure, lines, scatter
from mi_pipe.report.naming import sae_title

_MEASURES = {
    "fvu": ("FVU", "Sparsity against reconstruction", "Held-out rows. Lower left is better."),
    "ce_recovered": (
        "CE recovered",
        "Sparsity against cross-entropy recovered",
        "(CE zero-ablated - CE with SAE) / (CE zero-ablated - CE clean), held-out prompts. Upper left is better.",
    ),
    "kl": (
        "KL, nats a token",
        "Sparsity against divergence of the output",
        "KL of the next token's distribution, clean against with the SAE, held-out prompts. Lower left is better.",
    ),
}
_ORDER = ("place", "architecture", "width", "seed", "rate")


def families(sets: Sequence[Artifact]) -> dict[str, str]:
    """Return for each SAE's title what it has in common with those that differ from it in sparsity alone.

    That is a text of what tells these from the other SAEs: the architecture, say. SAEs without a readable config are
    left out.
    """
    found: dict[str, dict[str, str]] = {}
    for artifact in sets:
        for name in artifact.read_table("evaluation.parquet")["sae"].astype(str):
            file = f"saes/{name}/config.json"
            if file in artifact.manifest.files:
                parts = _parts(artifact.read_json(file))
                found[sae_title(artifact, name, len(sets))] = {"set": artifact.id, **parts}
    varied = [key for key in ("set", *_ORDER) if len({parts[key] for parts in found.values()}) > 1]
    shown = [key for key in varied if key != "set"] or ["architecture"]
    return {title: " ".join(filter(None, (parts[key] for key in shown))) for title, parts in found.items()}


def _parts(config: Mapping[str, Any]) -> dict[str, str]:
    """Return what an SAE is beside its sparsity, in words."""
    sites = config.get("sites", {})
    read, written = (" + ".join(sites.get(key, [config["hook"]])) for key in ("inputs", "outputs"))
    rate = config.get("training", {}).get("lr")
    return {
        "place": read if read == written else f"{read} -> {written}",
        "architecture": config["architecture"],
        "width": f"d{config['d_sae']}",
        "seed": f"seed {config['seed']}",
        "rate": f"lr {rate:g}" if rate is not None else "",
    }


def frontiers(evaluation: pd.DataFrame, family: Mapping[str, str]) -> list[Figure]:
    """Return a figure for each measure that there are values of."""
    return [figure for column in _MEASURES if (figure := _frontier(evaluation, column, family)) is not None]


def _frontier(evaluation: pd.DataFrame, column: str, family: Mapping[str, str]) -> Figure | None:
    if column not in evaluation:
        return None
    measured = evaluation.loc[~np.isnan(evaluation[column].to_numpy(float)), ["sae", "l0", column]]
    if measured.empty:
        return None
    label, title, caption = _MEASURES[column]
    values = measured[column].to_numpy(float)
    told = f"{len(values)} SAEs; {label} lies between {values.min():.3g} and {values.max():.3g}."
    names = {"x_title": "L0 (active features a row)", "y_title": label, "caption": caption}
    figure_name = f"l0-{column.replace('_', '-')}"
    measured = measured.assign(family=[family.get(str(sae), str(sae)) for sae in measured["sae"]])
    if measured["family"].duplicated().any():
        alt = f"Lines of {label} over L0, one for each of {measured['family'].nunique()} kinds of SAEs: {told}"
        ordered = measured.sort_values(["l0"], kind="stable")
        order = {name: i for i, name in enumerate(dict.fromkeys(measured["family"]))}
        ordered = ordered.iloc[np.argsort([order[name] for name in ordered["family"]], kind="stable")]
        is_log = bool((ordered["l0"] > 0).all())
        return lines(
            figure_name, title, alt, ordered, "l0", column, by="family", keep=("sae",), markers=True, log_x=is_log,
            **names,
        )  # fmt: skip
    alt = f"Scatter of {label} against L0, one point for each of {told}"
    return scatter(figure_name, title, alt, measured.drop(columns="family"), "l0", column, by="sae", **names)
