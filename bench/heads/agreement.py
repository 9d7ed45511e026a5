"""How far two measures of the same heads agree: rank correlation, the overlap of their tops, and a table of these.

A measure is a value a head with, where it is a mean over pairs, its bootstrap interval. Ranks are of signed values:
both measures of a class are defined so that a head of the class has a large positive one.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Float

from mi_pipe.patching.statistics import bootstrap_interval

TOP = 5


@dataclass(frozen=True)
class Measure:
    """One value a head (NaN where not measured), and the interval of its mean over pairs."""

    name: str
    values: Float[np.ndarray, "layer head"]
    low: Float[np.ndarray, "layer head"] | None = None
    high: Float[np.ndarray, "layer head"] | None = None

    @classmethod
    def of_pairs(cls, name: str, values: Float[np.ndarray, "pair layer head"]) -> "Measure":
        """Return the mean over pairs with its 95 % bootstrap interval."""
        values = np.asarray(values, np.float64)
        return cls(name, values.mean(0), *bootstrap_interval(values))

    def shown(self, head: int) -> str:
        """Return a head's value as text, heads counted through all layers."""
        value = self.values.flat[head]
        if np.isnan(value):
            return ""
        if self.low is None or self.high is None:
            return f"{value:.2f}"
        return f"{value:.2f} ({self.low.flat[head]:.2f} to {self.high.flat[head]:.2f})"


@dataclass(frozen=True)
class Comparison:
    """A class of heads by what describes it and by what interventions do; further measures are shown beside."""

    title: str
    described: Measure
    caused: Measure
    beside: Sequence[Measure] = ()

    def rank_correlation(self) -> float:
        """Return Spearman's correlation over the heads that both measured."""
        return spearman(self.described.values.ravel(), self.caused.values.ravel())

    def n_heads(self) -> int:
        """Return how many heads both measured."""
        return int((np.isfinite(self.described.values) & np.isfinite(self.caused.values)).sum())

    def shared_top(self) -> int:
        """Return how many heads are among the first five of both."""
        first, second = (set(top(measure.values)) for measure in (self._comparable(), self.caused))
        return len(first & second)

    def markdown(self) -> str:
        """Return a heading, the two figures, and a table of the heads that are among the first five of either."""
        measures = [self.described, self.caused, *self.beside]
        heads = dict.fromkeys([*top(self._comparable().values), *top(self.caused.values)])
        n_heads = self.described.values.shape[1]
        rows = {f"{head // n_heads}.{head % n_heads}": [measure.shown(head) for measure in measures] for head in heads}
        lines = [
            f"### {self.title}",
            f"{self.n_heads()} heads; rank correlation {self.rank_correlation():.2f}; "
            f"{self.shared_top()} of the first {TOP} in both",
            _table(["head", *(measure.name for measure in measures)], rows),
        ]
        return "\n\n".join(lines)

    def _comparable(self) -> Measure:
        """Return what describes, of the heads that the other measured too."""
        is_there = np.isfinite(self.caused.values)
        return Measure(self.described.name, np.where(is_there, self.described.values, np.nan))


def top(values: Float[np.ndarray, "layer head"], n: int = TOP) -> list[int]:
    """Return the heads with the largest values, counted through all layers.

    >>> top(np.array([[0.1, 0.9], [np.nan, 0.5]]), 2)
    [1, 3]
    """
    return [int(head) for head in np.argsort(-np.nan_to_num(values.ravel(), nan=-np.inf), kind="stable")[:n]]


def spearman(first: Float[np.ndarray, " head"], second: Float[np.ndarray, " head"]) -> float:
    """Return the correlation of ranks over the entries that both have; ties share their mean rank.

    >>> spearman(np.array([1.0, 2.0, 3.0, np.nan]), np.array([10.0, 30.0, 20.0, 0.0]))
    0.5
    """
    is_there = np.isfinite(first) & np.isfinite(second)
    ranks = [pd.Series(values[is_there]).rank().to_numpy() for values in (first, second)]
    return round(float(np.corrcoef(ranks)[0, 1]), 6)


def _table(columns: Sequence[str], rows: dict[str, list[str]]) -> str:
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    return "\n".join([*lines, *(f"| {' | '.join([name, *cells])} |" for name, cells in rows.items())])
