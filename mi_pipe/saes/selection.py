"""Selection of the k largest pre-activations of each row, exact.

Rows are folded into n_columns / fold maxima of `fold` columns each. The k largest values lie in the k folds with the
largest maxima, since each of those holds a value as large as the k-th maximum: only they are looked at again.

On the CPU, numpy finds the k-th largest value and the positions of true entries several times as fast as torch does,
block of rows by block of rows, in as many threads as torch uses. Of several equal values the first is taken there.
"""

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mi_pipe.saes.code import is_numpys
from mi_pipe.saes.row_blocks import map_row_blocks

_LARGEST_FOLD = 64
_GATHER_COST = 2
"""Looking at a value again costs about as much as finding the k-th largest among so many more maxima."""


def top_k_rows(pre: Float[Tensor, "batch d_sae"], k: int) -> tuple[Float[Tensor, "batch k"], Int[Tensor, "batch k"]]:
    """Return the k largest values of each row and their columns (int64), in the order of columns.

    Exact; of equal values at the edge, which ones are taken is decided by their columns alone. Raises RuntimeError if
    a row has fewer than k columns.
    """
    n_rows, n_columns = pre.shape
    if not is_numpys(pre) or k > n_columns:
        columns = _columns_by_torch(pre.detach(), k)
    else:
        array = pre.detach().numpy()
        parts = map_row_blocks(lambda rows: _columns_by_numpy(array[rows], k), n_rows, n_columns)
        columns = torch.from_numpy(np.concatenate(parts))
    return pre.gather(1, columns), columns


def _fold(n_columns: int, k: int) -> int:
    """Return how many columns to take the maximum of, a divisor of `n_columns`; 1 where that saves nothing."""
    folds = [fold for fold in range(2, _LARGEST_FOLD + 1) if n_columns % fold == 0 and n_columns // fold >= k]
    costs = {fold: n_columns // fold + _GATHER_COST * k * fold for fold in folds}
    best = min(costs, key=costs.__getitem__, default=1)
    return best if costs.get(best, n_columns) < n_columns else 1


# Fold j holds the columns j, j + n_folds, j + 2 n_folds, …: the maximum is then one of contiguous pieces, and
# candidates taken piece by piece are in the order of columns.


def _columns_by_numpy(values: Float[np.ndarray, "row column"], k: int) -> Int[np.ndarray, "row k"]:
    n_rows, n_columns = values.shape
    fold = _fold(n_columns, k)
    if fold == 1:
        return _largest(values, k)
    n_folds = n_columns // fold
    pieces = values.reshape(n_rows, fold, n_folds)
    folds = _largest(pieces.max(1), k)
    starts = folds + n_columns * np.arange(n_rows)[:, None]
    candidates = starts[:, None, :] + np.arange(0, n_columns, n_folds)[:, None]
    places = _largest(values.reshape(-1).take(candidates, mode="clip").reshape(n_rows, fold * k), k)
    return np.take_along_axis(folds, places % k, axis=1) + places // k * n_folds


def _largest(values: Float[np.ndarray, "row column"], k: int) -> Int[np.ndarray, "row k"]:
    """Return the columns of the k largest values of each row, ascending; the first of equal values at the edge."""
    n_rows, n_columns = values.shape
    edge = np.partition(values, n_columns - k, axis=1)[:, n_columns - k, None]
    is_kept = values >= edge
    positions = np.flatnonzero(is_kept)
    if len(positions) != n_rows * k:
        rows = np.flatnonzero(is_kept.sum(1) != k)
        is_above, is_equal = values[rows] > edge[rows], values[rows] == edge[rows]
        is_kept[rows] = is_above | (is_equal & (is_equal.cumsum(1) <= k - is_above.sum(1, keepdims=True)))
        positions = np.flatnonzero(is_kept)
    if len(positions) != n_rows * k:  # not a number is neither above nor below an edge
        return np.sort(np.argsort(values, axis=1)[:, n_columns - k :], axis=1)
    return positions.reshape(n_rows, k) % n_columns


def _columns_by_torch(values: Float[Tensor, "row column"], k: int) -> Int[Tensor, "row k"]:
    n_rows, n_columns = values.shape
    fold = _fold(n_columns, k)
    if fold == 1:
        return values.topk(k, dim=1, sorted=False).indices.sort(dim=1).values
    n_folds = n_columns // fold
    pieces = values.reshape(n_rows, fold, n_folds)
    folds = pieces.amax(1).topk(k, dim=1, sorted=False).indices.sort(dim=1).values
    candidates = pieces.gather(2, folds[:, None, :].expand(n_rows, fold, k)).view(n_rows, fold * k)
    places = candidates.topk(k, dim=1, sorted=False).indices.sort(dim=1).values
    return folds.gather(1, places % k) + places // k * n_folds
