"""Histograms of each feature's activations over the rows on which it fires.

Bins are of equal width from 0 to the feature's largest activation a: edge_i = a * i / n_bins in float32. As in
`numpy.histogram`, a bin holds its lower edge and not its upper one, except the last, which holds both. Counts are
exact: the place by division is corrected by comparing with the stored edges themselves.
"""

import numpy as np
from jaxtyping import Float32, Int32

from mi_pipe.features.density import max_activation
from mi_pipe.features.firings import Firings


def histogram_edges(largest: Float32[np.ndarray, " feature"], n_bins: int) -> Float32[np.ndarray, "feature edge"]:
    """Return n_bins + 1 edges a feature; the last is exactly `largest`."""
    edges = (largest[:, None].astype(np.float64) * np.arange(n_bins + 1) / n_bins).astype(np.float32)
    edges[:, -1] = largest
    return edges


def histograms_of(
    firings: Firings, n_bins: int
) -> tuple[Int32[np.ndarray, "feature bin"], Float32[np.ndarray, "feature edge"]]:
    """Return counts and edges of each feature; both are 0 for a feature that never fires."""
    largest = max_activation(firings)
    edges = histogram_edges(largest, n_bins)
    local = firings.feature - firings.first_feature
    place = _places(firings.activation, local, edges)
    counts = np.bincount(local * n_bins + place, minlength=firings.n_features * n_bins)
    return counts.reshape(firings.n_features, n_bins).astype(np.int32), edges


def _places(activation: np.ndarray, local: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Return the bin of each firing."""
    n_bins = edges.shape[1] - 1
    share = activation.astype(np.float64) / edges[local, -1]
    place = np.minimum((share * n_bins).astype(np.int64), n_bins - 1)
    place -= (activation < edges[local, place]) & (place > 0)
    place += (activation >= edges[local, place + 1]) & (place < n_bins - 1)
    return place
