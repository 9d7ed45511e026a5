"""The page of steering: metrics and perplexity against the coefficient, what an effect costs, and texts."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from mi_pipe.report.figures import Figure, lines
from mi_pipe.report.html import slug, visible
from mi_pipe.report.naming import name_of
from mi_pipe.report.page import Page
from mi_pipe.steering.steering import LOSS, Steering
from mi_pipe.steering.texts import GREEDY

_N_PROMPTS = 3
"""Prompts whose greedy texts a page shows; the others are in the table of all."""
_COEFFICIENT = "coefficient, in steps of each direction's scale"
_MOST = 700.0
"""Losses above this have no perplexity in float64."""


def page(artifacts: Sequence[Steering]) -> Page:
    """Make the page of one or more runs of steering."""
    return Page.of_sections(map(_section, artifacts))


def _section(found: Steering) -> tuple[dict[str, Any], list[Figure], dict[str, pd.DataFrame]]:
    stem, effects, texts = slug(found.id), found.effects(), found.generations()
    written = set(texts["direction"]) if len(texts) else set[str]()
    names = [name for name in found.directions()["direction"] if name in written]
    figures = [_curve(effects.loc[effects["measure"] == measure], measure, found, stem) for measure in found.measures]
    figures += _costs(effects, found.tasks, stem)
    section = {
        "name": name_of(found),
        "id": found.id,
        "slug": stem,
        "summary": found.summary,
        "positions": found.config["positions"],
        "directions": found.directions().drop(columns=["layer", "control_of"]),
        "figures": [figure.name for figure in figures],
        "texts": [{"direction": name, "frame": _shown(texts, name)} for name in names],
        "has_texts": bool(len(texts)),
        "has_effects": bool(len(effects)),
    }
    tables = {f"directions-{stem}": found.directions()}
    tables |= {f"effects-{stem}": effects} if len(effects) else {}
    tables |= {f"texts-{stem}": texts.drop(columns="token_ids")} if len(texts) else {}
    return section, figures, tables


def _curve(effects: pd.DataFrame, measure: str, found: Steering, stem: str) -> Figure:
    """Draw a metric, or the perplexity, against the coefficient, one line a direction, with 95% intervals."""
    is_loss = measure == LOSS
    columns = ["mean", "low", "high"]
    frame = (
        effects.assign(**{name: _perplexity(effects[name].to_numpy(float)) for name in columns}) if is_loss else effects
    )
    what = "perplexity of text" if is_loss else f"{found.config['metric']} on {measure}"
    top = frame.loc[frame["mean"].idxmin() if is_loss else frame["mean"].idxmax()]
    best = f"{'lowest' if is_loss else 'highest'} {top['mean']:.4g} under {top['direction']} at {top['coefficient']:g}"
    return lines(
        f"{slug(measure)}-{stem}", what.capitalize() if is_loss else what,
        f"Lines of {what} against the coefficient of {frame['direction'].nunique()} directions; {best}.",
        frame, "coefficient", "mean", by="direction", band=("low", "high"), markers=True, log_y=is_loss,
        x_title=_COEFFICIENT, y_title=what, caption="Bands are 95% bootstrap intervals over prompts.",
    )  # fmt: skip


def _costs(effects: pd.DataFrame, tasks: Sequence[str], stem: str) -> list[Figure]:
    """Draw each task's change of the metric against the change of the loss, if both were measured."""
    if effects.empty or LOSS not in set(effects["measure"]):
        return []
    keys = ["direction", "coefficient"]
    loss = effects.loc[effects["measure"] == LOSS].set_index(keys)[["change"]].set_axis(["loss"], axis=1)
    figures = []
    for task in tasks:
        both = effects.loc[effects["measure"] == task].join(loss, on=keys)
        best = both.loc[both["change"].abs().idxmax()]
        alt = (
            f"Lines of the metric's change on {task} against the change of the loss, one point a coefficient; the "
            f"largest change is {best['change']:.3g} under {best['direction']}, at {best['loss']:.3g} nats."
        )
        figures.append(
            lines(
                f"cost-{slug(task)}-{stem}", f"What a change costs: {task}", alt, both, "loss", "change",
                by="direction", markers=True, keep=("coefficient",), x_title="change of the loss on text, nats a token",
                y_title="change of the metric",
            )
        )  # fmt: skip
    return figures


def _perplexity(losses: np.ndarray) -> np.ndarray:
    return np.exp(np.minimum(losses, _MOST))


def _shown(texts: pd.DataFrame, direction: str) -> pd.DataFrame:
    """Return the greedy texts of the first prompts, prompt by prompt, with every character visible."""
    of_it = texts.loc[texts["direction"].isin(["", direction]) & (texts["sample"] == GREEDY)]
    chosen = of_it.loc[of_it["prompt"].isin(sorted(set(of_it["prompt"]))[:_N_PROMPTS])]
    ordered = chosen.sort_values(["prompt", "coefficient"])
    return pd.DataFrame({
        "prompt": [visible(text) for text in ordered["prompt_text"]],
        "coefficient": ordered["coefficient"].to_numpy(),
        "continuation": [visible(text) for text in ordered["text"]],
    })  # fmt: skip
