"""Means over rows and their 95% bootstrap intervals over prompts, from sums by prompt or by groups of prompts."""

import numpy as np
from jaxtyping import Float, Int

from mi_pipe.core.bootstrap import draw_weights
from mi_pipe.core.errors import ConfigError

_MOST_CLUSTERS = 512
_PERCENTILES = (2.5, 97.5)


def prompt_clusters(prompts: Int[np.ndarray, " row"]) -> tuple[Int[np.ndarray, " row"], int]:
    """Return the cluster of each row and their number: prompts, or groups of consecutive ones where there are many."""
    distinct, which = np.unique(prompts, return_inverse=True)
    n_clusters = min(len(distinct), _MOST_CLUSTERS)
    return which * n_clusters // len(distinct), n_clusters


def mean_and_interval(
    sums: Float[np.ndarray, "cluster *figure"], counts: Int[np.ndarray, " cluster"], seed: int
) -> tuple[Float[np.ndarray, "*figure"], Float[np.ndarray, "*figure"], Float[np.ndarray, "*figure"]]:
    """Return means over rows, and their 95% bootstrap intervals, from the sums and numbers of rows of each cluster."""
    if len(counts) < 2:  # noqa: PLR2004
        raise ConfigError("An interval over prompts needs at least two prompts.")
    weights = draw_weights(len(counts), seed)
    drawn = np.tensordot(weights, sums, axes=1) / (weights @ counts).reshape(-1, *[1] * (sums.ndim - 1))
    low, high = np.percentile(drawn, _PERCENTILES, axis=0)
    return sums.sum(0) / counts.sum(), low, high
