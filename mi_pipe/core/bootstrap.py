"""Bootstrap intervals over clusters (prompts): whole prompts are drawn, since tokens of one prompt are not independent.

The percentile interval of Efron (1979) with multinomial weights: a draw of n prompts with replacement is how often each
of them was drawn. Figures that are ratios of sums over prompts need nothing but these weights.
"""

import numpy as np
from jaxtyping import Float, Int

N_DRAWS = 1000
_TAIL_PERCENT = 2.5
_STREAM = 0xB007


def draw_weights(n_clusters: int, seed: int = 0, n_draws: int = N_DRAWS) -> Int[np.ndarray, "draw cluster"]:
    """Return how often each cluster comes up in each of the draws, int32; a function of the arguments alone."""
    generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, _STREAM])))
    return generator.multinomial(n_clusters, np.full(n_clusters, 1 / n_clusters), size=n_draws).astype(np.int32)


def interval(values: Float[np.ndarray, " draw"]) -> tuple[float, float]:
    """Return the 95% percentile interval of a figure over draws; NaN if it was defined in none of them.

    >>> interval(np.arange(101.0))
    (2.5, 97.5)
    """
    finite = values[np.isfinite(values)]
    if not len(finite):
        return np.nan, np.nan
    low, high = np.percentile(finite, [_TAIL_PERCENT, 100 - _TAIL_PERCENT])
    return float(low), float(high)


def ratio_interval(
    sums: Float[np.ndarray, " cluster"], counts: Float[np.ndarray, " cluster"], seed: int = 0
) -> tuple[float, float]:
    """Return the interval of a mean over all tokens, from each cluster's sum and number of tokens."""
    weights = draw_weights(len(sums), seed)
    with np.errstate(divide="ignore", invalid="ignore"):
        return interval((weights @ sums) / (weights @ counts))
