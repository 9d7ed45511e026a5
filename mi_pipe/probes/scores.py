"""How well a probe reads, with 95% intervals by drawing prompts: accuracy and AUC of classes, R² of numbers.

AUC is the chance that a row of a class has a higher score than one of another, ties counting half; of more than two
classes the mean over classes against the rest, for those that occur. R² = 1 - Σ (y - ŷ)² / Σ (y - ȳ)², ȳ over the
same rows.
"""

from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from mi_pipe.core.bootstrap import draw_weights, interval

_DRAWS_AT_ONCE = 100


@dataclass(frozen=True)
class Score:
    """A figure and its interval; NaN where it is not defined."""

    value: float
    low: float = np.nan
    high: float = np.nan
    draws: Float[np.ndarray, " draw"] = field(default_factory=lambda: np.empty(0), compare=False, repr=False)
    """The figure under each draw of prompts, where it was drawn."""


def drawn_score(value: float, draws: Float[np.ndarray, " draw"]) -> Score:
    """Return a figure with its interval and draws."""
    return Score(value, *interval(draws), draws)


def difference(first: Score, second: Score) -> Score:
    """Return first - second with its interval: both are of the same rows, so that their prompts are drawn alike."""
    return drawn_score(first.value - second.value, first.draws - second.draws)


NO_SCORE = Score(np.nan)


def predicted_classes(scores: Float[np.ndarray, "row output"]) -> Int[np.ndarray, " row"]:
    """Return the class of the highest logit; one output is the logit of class 1."""
    return (scores[:, 0] > 0).astype(np.int64) if scores.shape[1] == 1 else scores.argmax(1)


def accuracy(
    scores: Float[np.ndarray, "row output"], y: Int[np.ndarray, " row"], cluster: Int[np.ndarray, " row"]
) -> Score:
    """Return the share of rows whose class is right."""
    right = (predicted_classes(scores) == y).astype(float)
    numbers = np.unique(cluster, return_inverse=True)[1]
    sums, counts = np.bincount(numbers, right), np.bincount(numbers).astype(float)
    weights = draw_weights(len(counts))
    return drawn_score(float(right.mean()), (weights @ sums) / (weights @ counts))


def r_squared(
    predicted: Float[np.ndarray, " row"], y: Float[np.ndarray, " row"], cluster: Int[np.ndarray, " row"]
) -> Score:
    """Return R²; NaN where the target never varies."""
    numbers = np.unique(cluster, return_inverse=True)[1]
    # About the mean, so that sums of squares lose no digits; a constant drops out of both sums.
    centred = y - y.mean()
    columns = [np.ones_like(y), centred, centred**2, (y - predicted) ** 2]
    sums = np.stack([np.bincount(numbers, column) for column in columns], axis=1)
    drawn = draw_weights(len(sums)) @ sums
    return drawn_score(float(_r_squared(sums.sum(0)[None])[0]), _r_squared(drawn))


def _r_squared(sums: Float[np.ndarray, "draw 4"]) -> Float[np.ndarray, " draw"]:
    n, total, squares, errors = sums.T
    spread = squares - total**2 / n
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(spread > 0, 1 - errors / spread, np.nan)


def auc(scores: Float[np.ndarray, "row output"], y: Int[np.ndarray, " row"], cluster: Int[np.ndarray, " row"]) -> Score:
    """Return the AUC; the interval for two classes only."""
    if scores.shape[1] > 1:
        found = [_auc(scores[:, k], y == k, np.ones((1, len(y))))[0] for k in range(scores.shape[1])]
        known = [value for value in found if np.isfinite(value)]
        return Score(float(np.mean(known))) if known else NO_SCORE
    value = float(_auc(scores[:, 0], y == 1, np.ones((1, len(y))))[0])
    numbers = np.unique(cluster, return_inverse=True)[1]
    weights = draw_weights(int(numbers.max()) + 1)
    pieces = [weights[i : i + _DRAWS_AT_ONCE][:, numbers] for i in range(0, len(weights), _DRAWS_AT_ONCE)]
    return drawn_score(value, np.concatenate([_auc(scores[:, 0], y == 1, piece) for piece in pieces]))


def _auc(
    score: Float[np.ndarray, " row"], is_class: Bool[np.ndarray, " row"], weights: Shaped[np.ndarray, "draw row"]
) -> Float[np.ndarray, " draw"]:
    """Return the AUC under each draw's weights of rows; NaN where a draw has one class alone."""
    order = np.argsort(score, kind="stable")
    starts = np.flatnonzero(np.diff(score[order], prepend=-np.inf) != 0)
    ordered = weights[:, order].astype(float)
    inside = np.add.reduceat(ordered * is_class[order], starts, axis=1)
    outside = np.add.reduceat(ordered * ~is_class[order], starts, axis=1)
    below = np.cumsum(outside, axis=1) - outside / 2
    with np.errstate(divide="ignore", invalid="ignore"):
        return (inside * below).sum(1) / (inside.sum(1) * outside.sum(1))
