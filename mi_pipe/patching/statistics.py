"""How sure a mean over pairs is: percentile bootstrap intervals and sign-flip permutation p-values, cell by cell.

Bootstrap (Efron 1979): pairs are drawn with replacement, all cells from the same draws, and the interval lies between
percentiles of the draws' means. Sign flips (Fisher 1935): were a patch without effect on average, each pair's change
could as well have the other sign; p is the share of sign patterns whose mean is as far from zero as the one found.
All patterns are tried where there are few pairs, else random ones, counted with the one found, so that p is never 0.

p-values are of one cell each: among hundreds of cells some are small by chance.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

_EXACT_UP_TO = 12
"""So many pairs have 4,096 sign patterns."""
_CLOSE = 1e-9


@dataclass(frozen=True)
class Resampling:
    """How many draws, from which seed, and which share of them an interval holds."""

    n_resamples: int = 2000
    n_permutations: int = 4096
    level: float = 0.95
    seed: int = 0


def bootstrap_weights(n_pairs: int, how: Resampling) -> Float[np.ndarray, "resample pair"]:
    """Return how often each pair is in each draw of as many pairs, with replacement."""
    rng = np.random.default_rng(how.seed)
    return rng.multinomial(n_pairs, np.full(n_pairs, 1 / n_pairs), size=how.n_resamples).astype(np.float64)


def weighted_means(
    weights: Float[np.ndarray, "resample pair"], values: Float[np.ndarray, "pair *cell"]
) -> Float[np.ndarray, "resample *cell"]:
    """Return each draw's mean over the pairs that have a cell (are no NaN there); NaN where no drawn pair has it."""
    is_there = ~np.isnan(values)
    sums = np.tensordot(weights, np.where(is_there, values, 0.0), axes=1)
    counts = np.tensordot(weights, is_there.astype(np.float64), axes=1)
    return np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0)


def percentile_interval(
    draws: Float[np.ndarray, "resample *cell"], level: float
) -> tuple[Float[np.ndarray, "*cell"], Float[np.ndarray, "*cell"]]:
    """Return the percentiles (1 - level) / 2 and (1 + level) / 2 of finite draws; NaN where there are none."""
    finite = np.where(np.isfinite(draws), draws, np.nan)
    has_any = ~np.isnan(finite).all(0)
    out = np.full((2, *draws.shape[1:]), np.nan)
    tail = (1 - level) / 2
    out[:, has_any] = np.nanquantile(finite[:, has_any], [tail, 1 - tail], axis=0)
    return out[0], out[1]


def bootstrap_interval(
    values: Float[np.ndarray, "pair *cell"], how: Resampling | None = None
) -> tuple[Float[np.ndarray, "*cell"], Float[np.ndarray, "*cell"]]:
    """Return the percentile bootstrap interval of each cell's mean over pairs (over those that have it)."""
    how = how or Resampling()
    return percentile_interval(weighted_means(bootstrap_weights(len(values), how), values), how.level)


def sign_flip_p(changes: Float[np.ndarray, "pair *cell"], how: Resampling | None = None) -> Float[np.ndarray, "*cell"]:
    """Return the two-sided p-value of "the mean change is zero" of each cell, NaN where no pair has it."""
    how = how or Resampling()
    is_there = ~np.isnan(changes)
    known = np.where(is_there, changes, 0.0).astype(np.float64)
    signs = _signs(len(changes), how)
    found = np.abs(known.sum(0))
    # A pair without the cell adds 0 under either sign, so the pairs that have it see all their patterns alike.
    is_as_far = np.abs(np.tensordot(signs, known, axes=1)) >= found - _CLOSE * np.abs(known).sum(0)
    n_extra = 0 if len(changes) <= _EXACT_UP_TO else 1
    p = (is_as_far.sum(0) + n_extra) / (len(signs) + n_extra)
    return np.where(is_there.any(0), p, np.nan)


def _signs(n_pairs: int, how: Resampling) -> Float[np.ndarray, "pattern pair"]:
    if n_pairs <= _EXACT_UP_TO:
        bits = np.arange(2**n_pairs)[:, None] >> np.arange(n_pairs) & 1
    else:
        bits = np.random.default_rng(how.seed).integers(0, 2, (how.n_permutations, n_pairs))
    return 1.0 - 2.0 * bits
