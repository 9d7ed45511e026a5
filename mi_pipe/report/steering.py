"""The page of steering: changes of metrics and perplexity against the coefficient, what they cost, and texts.

Changes from coefficient 0 are drawn, not values: their intervals are of the same prompts, and those of values say
mostly how prompts differ.
"""

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
"""Changes of the loss above this have no exponential in float64."""


def page(artifacts: Sequence[Steering]) -> Page:
    """Make the page of one or more runs of steering."""
    return Page.of_sections(map(_section, artifacts))


def _section(found: Steering) -> tuple[dict[str, Any], list[Figure], dict[str, pd.DataFrame]]:
    stem, effects, texts, directions = slug(found.id), found.effects(), found.generations(), found.directions()
    written = set(texts["direction"]) if len(texts) else set[str]()
    figures = [_curve(effects.loc[effects["measure"] == measure], measure, found, stem) for measure in found.measures]
    figures += _costs(effects, found, stem)
    section = {
        "name": name_of(found),
        "id": found.id,
        "slug": stem,
        "summary": _summary(found),
        "positions": found.config["positions"],
        "directions": directions.drop(columns=["layer", "control_of"]),
        "figures": [figure.name for figure in figures],
        "texts": [
            {"direction": name, "prompts": _shown(texts, name)} for name in directions["direction"] if name in written
        ],
        "has_texts": bool(len(texts)),
        "has_effects": bool(len(effects)),
    }
    tables = {f"directions-{stem}": directions}
    tables |= {f"effects-{stem}": effects} if len(effects) else {}
    tables |= {f"texts-{stem}": texts.drop(columns="token_ids")} if len(texts) else {}
    return section, figures, tables


def _summary(found: Steering) -> dict[str, Any]:
    """Return the main figures under names that say what they are."""
    figures, metric = dict(found.summary), found.config["metric"]
    names = {"metric": f"{metric}, model as it is", "metric_there": f"{metric} there", "strongest": "moves it most"}
    names |= {"perplexity": "perplexity, model as it is", "perplexity_there": "perplexity there"}
    order = ["n_directions", "metric", "strongest", "metric_there", "perplexity", "perplexity_there"]
    return {names.get(key, key): figures[key] for key in order if key in figures}


def _controls(found: Steering) -> dict[str, str]:
    """Return the direction of each random one."""
    table = found.directions()
    random = table.loc[table["control_of"] != ""]
    return dict(zip(random["direction"], random["control_of"], strict=True))


def _curve(effects: pd.DataFrame, measure: str, found: Steering, stem: str) -> Figure:
    """Draw the change of a metric, or the factor of perplexity, against the coefficient, one line a direction."""
    if measure == LOSS:
        return _perplexity(effects, found, stem)
    what, base = f"{found.config['metric']} on {measure}", effects.loc[effects["coefficient"] == 0].iloc[0]
    top = effects.loc[effects["change"].abs().idxmax()]
    return lines(
        f"{slug(measure)}-{stem}", f"Change of {what}",
        f"Lines of the change of {what} against the coefficient of {effects['direction'].nunique()} directions; the "
        f"largest is {top['change']:.4g} under {top['direction']} at {top['coefficient']:g}.",
        effects, "coefficient", "change", by="direction", band=("change_low", "change_high"), markers=True,
        keep=("mean", "low", "high"), controls=_controls(found), x_title=_COEFFICIENT, y_title=f"change of {what}",
        caption=f"At 0 it is {_interval(base)}. {_caption(found, 'pair', measure)}",
    )  # fmt: skip


def _perplexity(effects: pd.DataFrame, found: Steering, stem: str) -> Figure:
    columns = ["change", "change_low", "change_high"]
    factors = np.exp(effects[columns].to_numpy(float).clip(max=_MOST))
    frame = effects.assign(factor=factors[:, 0], low=factors[:, 1], high=factors[:, 2])
    frame = frame.assign(perplexity=np.exp(frame["mean"].clip(upper=_MOST)))
    own = np.exp(effects.loc[effects["coefficient"] == 0, ["mean", "low", "high"]].iloc[0])
    n_tokens = int(found.to_xarray(LOSS)["n_tokens"].sum())
    worst = frame.loc[frame["factor"].idxmax()]
    return lines(
        f"{slug(LOSS)}-{stem}", "Perplexity of text, times the model's own",
        f"Lines of the factor of perplexity against the coefficient of {frame['direction'].nunique()} directions; the "
        f"largest is {worst['factor']:.4g} under {worst['direction']} at {worst['coefficient']:g}.",
        frame, "coefficient", "factor", by="direction", band=("low", "high"), markers=True, log_y=True,
        keep=("perplexity",), controls=_controls(found), x_title=_COEFFICIENT, y_title="times the model's own",
        caption=f"The model's own is {_interval(own)}, on {n_tokens:,} tokens. {_caption(found, 'prompt', LOSS)}",
    )  # fmt: skip


def _interval(row: pd.Series) -> str:
    return f"{row['mean']:.4g} ({row['low']:.4g} to {row['high']:.4g})"


def _caption(found: Steering, what: str, measure: str) -> str:
    n_prompts = found.to_xarray(measure).sizes[what]
    dashed = " Dashed: random directions with steps of the same length." if _controls(found) else ""
    return f"Bands are 95% bootstrap intervals of changes on the same {n_prompts} prompts.{dashed}"


def _costs(effects: pd.DataFrame, found: Steering, stem: str) -> list[Figure]:
    """Draw each task's change of the metric against the change of the loss, if both were measured."""
    if effects.empty or LOSS not in set(effects["measure"]):
        return []
    keys = ["direction", "coefficient"]
    loss = effects.loc[effects["measure"] == LOSS].set_index(keys)[["change"]].set_axis(["loss"], axis=1)
    figures = []
    for task in found.tasks:
        both = effects.loc[effects["measure"] == task].join(loss, on=keys)
        best = both.loc[both["change"].abs().idxmax()]
        alt = (
            f"Lines of the metric's change on {task} against the change of the loss, one point a coefficient; the "
            f"largest change is {best['change']:.3g} under {best['direction']}, at {best['loss']:.3g} nats."
        )
        figures.append(
            lines(
                f"cost-{slug(task)}-{stem}", f"What a change costs: {task}", alt, both, "loss", "change",
                by="direction", markers=True, keep=("coefficient",), controls=_controls(found),
                x_title="change of the loss on text, nats a token", y_title="change of the metric",
                caption="One point a coefficient, in their order.",
            )
        )  # fmt: skip
    return figures


def _shown(texts: pd.DataFrame, direction: str) -> list[dict[str, Any]]:
    """Return the greedy texts of the first prompts, a table each, with every character visible."""
    of_it = texts.loc[texts["direction"].isin(["", direction]) & (texts["sample"] == GREEDY)]
    chosen = of_it.loc[of_it["prompt"].isin(sorted(set(of_it["prompt"]))[:_N_PROMPTS])]
    return [
        {"prompt": visible(rows["prompt_text"].iloc[0]), "frame": _table(rows)}
        for _, rows in chosen.sort_values(["prompt", "coefficient"]).groupby("prompt", sort=False)
    ]


def _table(rows: pd.DataFrame) -> pd.DataFrame:
    return pd.DataFrame({"coefficient": rows["coefficient"], "continuation": list(map(visible, rows["text"]))})
