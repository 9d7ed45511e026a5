"""The page of lenses: what the residual stream says of the next token by depth and position, and what tuning gains.

Depth 0 is the embedding, depth l the residual stream after l blocks; the lens of the last depth is the model itself.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Float, Int

from mi_pipe.core.bootstrap import ratio_interval
from mi_pipe.lenses.evaluation import LOGIT, MODEL, TUNED
from mi_pipe.lenses.lens_readings import LensReadings
from mi_pipe.report.figures import Figure, lines
from mi_pipe.report.heatmaps import heatmap
from mi_pipe.report.html import slug
from mi_pipe.report.lens_grids import grids
from mi_pipe.report.naming import name_of
from mi_pipe.report.page import Page

_BAND = ("low", "high")
_TITLES = {LOGIT: "logit lens", TUNED: "tuned lens", MODEL: "the model itself"}
_EVALUATED = {
    "kl": ("KL to the model's own distribution", "KL, nats a token"),
    "top_agreement": ("Likeliest token is the model's", "share of tokens"),
    "cross_entropy": ("Cross-entropy of the next token", "cross-entropy, nats a token"),
}
_MAPS = {
    "kl": ("KL to the model's own distribution, by depth and position", "KL in nats"),
    "log_prob": ("Log-probability of the answer, by depth and position", "log-probability in nats"),
}
_QUARTILES = (25, 75)
_COLOURED = (5, 95)
"""Percentiles at which the colours of a map end."""
_MAX_CURVES = 8


def page(artifacts: Sequence[LensReadings]) -> Page:
    """Make the page of lens readings."""
    sections, figures, tables = [], [], {}
    for found in artifacts:
        stem = slug(found.id)
        tuned = _tuned(found, stem) if found.is_tuned else []
        tasks = [_task(found, task, f"{number}-{stem}") for number, task in enumerate(found.tasks)]
        figures += [*tuned, *(figure for _, drawn in tasks for figure in drawn)]
        tables |= {f"evaluation-{stem}": found.evaluation} if found.is_tuned else {}
        section = {"name": name_of(found), "id": found.id, "slug": stem, "summary": found.summary}
        sections.append(
            {**section, "tuned": [figure.name for figure in tuned], "tasks": [context for context, _ in tasks]}
        )
    return Page(context={"sections": sections}, figures=figures, tables=tables)


def _tuned(found: LensReadings, stem: str) -> list[Figure]:
    """Draw both lenses on held-out rows, and how the training went."""
    table = found.evaluation
    known = [name for name in _EVALUATED if np.isfinite(table[name].to_numpy(float)).any()]
    return [*(_evaluated(table, name, stem) for name in known), _training(found.training, stem)]


def _evaluated(table: pd.DataFrame, name: str, stem: str) -> Figure:
    title, y_title = _EVALUATED[name]
    kept = {"lens": table["lens"], "depth": table["depth"], name: table[name]}
    frame = pd.DataFrame(kept | {side: table[f"{name}_{side}"] for side in _BAND})
    of_lenses = frame.loc[frame["lens"] != MODEL]
    if name == "cross_entropy":
        own = frame.loc[frame["lens"] == MODEL].drop(columns="depth")
        of_lenses = pd.concat([of_lenses, own.merge(pd.DataFrame({"depth": of_lenses["depth"].unique()}), how="cross")])
    first = of_lenses.loc[of_lenses["depth"] == of_lenses["depth"].min()].set_index("lens")[name]
    drawn = of_lenses.assign(lens=[_TITLES[lens] for lens in of_lenses["lens"]])
    return lines(
        f"{slug(name).replace('_', '-')}-{stem}",
        title,
        f"Lines of {y_title} by depth on held-out rows; at the first depth {first[LOGIT]:.3g} by the logit lens and "
        f"{first[TUNED]:.3g} by the tuned lens.",
        drawn, "depth", name, by="lens", band=_BAND, whole_x=True, markers=True, from_zero=True,
        x_title="depth (blocks that have written)", y_title=y_title, caption="Held-out prompts; bands: 95% by prompt.",
    )  # fmt: skip


def _training(table: pd.DataFrame, stem: str) -> Figure:
    depths = np.unique(table["depth"])
    shown = depths[np.unique(np.linspace(0, len(depths) - 1, min(len(depths), _MAX_CURVES)).round().astype(int))]
    frame = table.loc[table["depth"].isin(shown.tolist())].sort_values(["depth", "step"], kind="stable")
    frame = frame.assign(depth="depth " + frame["depth"].astype(str))
    return lines(
        f"training-{stem}",
        "Training of the tuned lens",
        f"Lines of the KL on validation prompts by optimiser step for {len(shown)} of {len(depths)} depths.",
        frame, "step", "validation_kl", by="depth", keep=("training_kl",), markers=True,
        log_y=bool((frame["validation_kl"] > 0).all()), x_title="optimiser steps", y_title="KL, nats a token",
        caption="On validation prompts; step 0 is the logit lens. Each depth keeps its best moment.",
    )  # fmt: skip


def _task(found: LensReadings, task: str, stem: str) -> tuple[dict[str, Any], list[Figure]]:
    data = found.to_xarray(task)
    n_pos = (data["token_id"] >= 0).sum("pos").to_numpy()
    curves = [_answer(data, n_pos, task, stem), _places(data, n_pos, task, stem)]
    longest = int(pd.Series(n_pos).mode().iloc[0])
    chosen = data["prompt"].to_numpy()[n_pos == longest]
    labels = found.labels(task, int(chosen[0]))
    maps = [_maps(data.sel(prompt=chosen).isel(pos=slice(longest)), name, labels, stem) for name in _MAPS]
    context = {
        "name": task,
        "n_prompts": len(n_pos),
        "curves": [figure.name for figure in curves],
        "maps": [[figure.name for figure in pair] for pair in maps],
        "n_pos": longest,
        "n_mapped": len(chosen),
        "grids": grids(found, task),
    }
    return context, [*curves, *(figure for pair in maps for figure in pair)]


def _at_last(values: xr.DataArray, n_pos: Int[np.ndarray, " prompt"]) -> Float[np.ndarray, "prompt depth"]:
    ordered = values.transpose("prompt", "depth", "pos").to_numpy()
    return ordered[np.arange(len(n_pos)), :, n_pos - 1].astype(float)


def _answer(data: xr.Dataset, n_pos: Int[np.ndarray, " prompt"], task: str, stem: str) -> Figure:
    rows = []
    for lens in data["lens"].values.tolist():
        for choice, text in (("answer", "answer"), ("wrong", "wrong token")):
            by_prompt = _at_last(data["log_prob"].sel(lens=lens, choice=choice), n_pos)
            for depth, values in enumerate(by_prompt.T):
                low, high = ratio_interval(values, np.ones(len(values)))
                read = {"token": f"{text}, {_TITLES[lens]}", "depth": depth, "log_prob": values.mean()}
                rows.append(read | {"low": low, "high": high})
    frame = pd.DataFrame(rows).dropna()
    last = frame.loc[frame["depth"] == frame["depth"].max()].drop_duplicates("token")["log_prob"].iloc[0]
    return lines(
        f"answer-{stem}",
        "Log-probability of the answer at the last position",
        f"Lines of the mean log-probability of the answer and the wrong token of {task} by depth; the answer's is "
        f"{last:.3g} at the last depth.",
        frame, "depth", "log_prob", by="token", band=_BAND, whole_x=True, markers=True,
        x_title="depth (blocks that have written)", y_title="log-probability, nats",
        caption=f"Mean of {len(n_pos)} prompts; bands: 95% by prompt.",
    )  # fmt: skip


def _places(data: xr.Dataset, n_pos: Int[np.ndarray, " prompt"], task: str, stem: str) -> Figure:
    parts = []
    for lens in data["lens"].values.tolist():
        places = _at_last(data["rank"].sel(lens=lens, choice="answer"), n_pos) + 1
        low, high = np.percentile(places, _QUARTILES, axis=0)
        found = {"depth": np.arange(places.shape[1]), "place": np.median(places, axis=0), "low": low, "high": high}
        # Ranks are -1 at depths without a translator.
        parts.append(pd.DataFrame(found).loc[places.min(0) > 0].assign(lens=_TITLES[lens]))
    frame = pd.concat(parts, ignore_index=True)
    return lines(
        f"place-{stem}",
        "Place of the answer among all tokens",
        f"Lines of the median place of the answer of {task} by depth, 1 being the likeliest token; it ends at "
        f"{parts[0]['place'].iloc[-1]:g}.",
        frame, "depth", "place", by="lens", band=_BAND, whole_x=True, markers=True, log_y=True,
        x_title="depth (blocks that have written)", y_title="place (1 is the likeliest)",
        caption=f"Median of {len(n_pos)} prompts; bands: their middle half.",
    )  # fmt: skip


def _maps(data: xr.Dataset, name: str, labels: list[str], stem: str) -> list[Figure]:
    """Draw one figure of every lens by depth and position, in the same colours."""
    title, unit = _MAPS[name]
    values = data[name].sel(choice="answer") if name == "log_prob" else data[name]
    means = values.mean("prompt").transpose("lens", "depth", "pos").to_numpy()
    # The embedding's figures are mostly far from all others and would take the colours for themselves.
    low, high = np.nanpercentile(means, _COLOURED).tolist()
    return [
        heatmap(
            f"{slug(name).replace('_', '-')}-map-{lens}-{stem}",
            title,
            f"Heatmap of {unit} by depth and position, {_TITLES[lens]}; from {np.nanmin(grid):.3g} to "
            f"{np.nanmax(grid):.3g}.",
            grid, [str(depth) for depth in range(len(grid))], labels, row_title="depth", column_title="token",
            value_title=f"{unit}, {_TITLES[lens]}", low=low, high=high,
            caption="Colours end at the 5th and 95th percentile.",
        )
        for lens, grid in zip(data["lens"].values.tolist(), means, strict=True)
    ]  # fmt: skip
