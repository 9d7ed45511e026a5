"""The page of SAEs: training curves, the evaluation on held-out prompts, and the trade of L0 against FVU.

SAEs that were imported have no curves, and no figures of the evaluation if they were not measured.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from mi_pipe.core.artifact import Artifact
from mi_pipe.report.figures import Figure, lines, scatter
from mi_pipe.report.naming import sae_title
from mi_pipe.report.page import Page

_CURVES = {
    "fvu": ("Fraction of variance unexplained", "FVU", True),
    "l0": ("Active latents a token", "L0", False),
    "dead_fraction": ("Dead latents", "fraction dead", False),
    "loss": ("Training loss", "loss", True),
}
_MAX_POINTS = 400
_MANY = 1


def page(sets: Sequence[Artifact]) -> Page:
    """Make the page of one or more sets of SAEs."""
    training = _joined(sets, "training.parquet")
    evaluation = _joined(sets, "evaluation.parquet")
    curves = [_curve(training, column) for column in _CURVES if column in training and len(training)]
    others = [*_trade_off(evaluation), *_recovered(evaluation)]
    return Page(
        context={
            "curves": [figure.name for figure in curves],
            "others": [figure.name for figure in others],
            "evaluation": evaluation,
            "n_tokens": int(training["tokens"].to_numpy().max()) if "tokens" in training and len(training) else None,
        },
        figures=[*curves, *others],
        tables={"training": training, "evaluation": evaluation},
    )


def _joined(sets: Sequence[Artifact], name: str) -> pd.DataFrame:
    """Return the tables of all sets after one another; the set's label leads where there are several."""
    frames = [artifact.read_table(name) for artifact in sets]
    if len(sets) > _MANY:
        named = zip(frames, sets, strict=True)
        frames = [
            frame.assign(sae=[sae_title(artifact, str(sae), len(sets)) for sae in frame["sae"]])
            for frame, artifact in named
        ]
    return pd.concat([frame for frame in frames if len(frame)] or frames[:1], ignore_index=True)


def _curve(training: pd.DataFrame, column: str) -> Figure:
    title, y_title, is_log = _CURVES[column]
    thinned = pd.concat([_thin(rows) for _, rows in training.groupby("sae", sort=False, observed=True)])
    last = training.groupby("sae", sort=False, observed=True)[column].last()
    return lines(
        column,
        title,
        f"Line chart of {y_title} against training tokens for {len(last)} SAEs; "
        f"the last values lie between {last.min():.3g} and {last.max():.3g}.",
        thinned,
        "tokens",
        column,
        by="sae",
        x_title="training tokens",
        y_title=y_title,
        from_zero=not is_log,
        log_y=is_log and bool((thinned[column] > 0).all()),
    )


def _thin(rows: pd.DataFrame) -> pd.DataFrame:
    """Keep at most `_MAX_POINTS` evenly spaced rows, the last always."""
    step = -(-len(rows) // _MAX_POINTS)
    return rows.iloc[::-1].iloc[::step].iloc[::-1]


def _trade_off(evaluation: pd.DataFrame) -> list[Figure]:
    measured = _measured(evaluation, "fvu")
    if not len(measured):
        return []
    return [
        scatter(
            "l0-fvu",
            "Sparsity against reconstruction",
            f"Scatter of FVU against L0 on held-out prompts, one point for each of {len(measured)} SAEs; "
            "lower left is better.",
            measured.loc[:, ["sae", "l0", "fvu"]],
            "l0",
            "fvu",
            by="sae",
            x_title="L0 (active latents a token)",
            y_title="FVU",
            caption="Held-out prompts. Lower left is better: fewer latents, less left unexplained.",
        )
    ]


def _measured(evaluation: pd.DataFrame, column: str) -> pd.DataFrame:
    """Return the rows that have a figure."""
    return evaluation.loc[~np.isnan(evaluation[column].to_numpy(float))]


def _recovered(evaluation: pd.DataFrame) -> list[Figure]:
    evaluation = _measured(evaluation, "ce_recovered") if "ce_recovered" in evaluation else evaluation.head(0)
    if not len(evaluation):
        return []
    best = evaluation["ce_recovered"].max()
    return [
        scatter(
            "l0-ce-recovered",
            "Sparsity against cross-entropy recovered",
            f"Scatter of cross-entropy recovered against L0 for {len(evaluation)} SAEs; the best is {best:.3g}.",
            evaluation.loc[:, ["sae", "l0", "ce_recovered"]],
            "l0",
            "ce_recovered",
            by="sae",
            x_title="L0 (active latents a token)",
            y_title="CE recovered",
            caption="(CE zero-ablated - CE with SAE) / (CE zero-ablated - CE clean); upper left is better.",
        )
    ]
