"""How often and how strongly each feature fires, over the whole set of rows.

density_f = n_f / N, with n_f the rows on which feature f fires and N the rows that were scored (all stored
rows but the massive ones). The mean activation is over firing rows only; sums are in float64.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Float64, Int64

from mi_pipe.features.firings import Firings


@dataclass(frozen=True)
class Density:
    """Figures of successive features."""

    n_firings: Int64[np.ndarray, " feature"]
    density: Float64[np.ndarray, " feature"]
    mean_activation: Float64[np.ndarray, " feature"]
    """Over firing rows; NaN for a feature that never fires."""
    max_activation: Float32[np.ndarray, " feature"]
    """0 for a feature that never fires."""


def density_of(firings: Firings, n_rows: int) -> Density:
    """Return the figures of each feature, with `n_rows` the number of rows scored."""
    counts = firings.counts
    total = _reduced(np.add, firings.activation.astype(np.float64), firings)
    mean = np.divide(total, counts, out=np.full(len(counts), np.nan), where=counts > 0)
    return Density(counts, counts / max(n_rows, 1), mean, max_activation(firings))


def max_activation(firings: Firings) -> Float32[np.ndarray, " feature"]:
    """Return the largest activation of each feature; 0 if it never fires."""
    return _reduced(np.maximum, firings.activation, firings)


def _reduced(reduction: np.ufunc, values: np.ndarray, firings: Firings) -> np.ndarray:
    """Reduce each feature's slice; `reduceat` cannot take empty slices, so these are left at 0."""
    result = np.zeros(firings.n_features, values.dtype)
    fires = firings.counts > 0
    if fires.any():
        result[fires] = reduction.reduceat(values, firings.starts[:-1][fires])
    return result
