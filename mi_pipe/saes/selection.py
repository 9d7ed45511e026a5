"""Selection of the largest pre-activations, exact: of each row, and of a whole batch that comes in chunks of rows.

Both begin with a bound that is surely not above what is sought, so that all but a few values are looked at
once, by a maximum or a comparison:

- Rows: fold each row into n_columns / fold maxima of `fold` columns each. The k largest values lie in the k folds with
  the largest maxima, since each of those holds a value as large as the k-th maximum. Only they are looked at again.
- Batch: a sample of the chunk gives a bound that somewhat more values exceed than are sought; chunks that come later
  need only beat the smallest value that is kept so far.

On the CPU, numpy finds the k-th largest value and the positions of true entries several times as fast as torch does;
of several equal values the first is taken there.
"""

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mi_pipe.saes.code import SparseCode, above, is_numpys, n_true, true_positions

_LARGEST_FOLD = 64
_GATHER_COST = 2
"""Looking at a value again costs about as much as finding the k-th largest among so many more maxima."""
_SAMPLE_STRIDE = 61


def top_k_rows(pre: Float[Tensor, "batch d_sae"], k: int) -> tuple[Float[Tensor, "batch k"], Int[Tensor, "batch k"]]:
    """Return the k largest values of each row and their columns (int64), in the order of columns.

    Exact; of equal values at the edge, which ones are taken is decided by their columns alone. Raises RuntimeError if
    a row has fewer than k columns.
    """
    fold = _fold(pre.shape[1], k)
    if fold == 1:
        columns = _largest(pre.detach(), k)
        return pre.gather(1, columns), columns
    values, columns = _largest_by_folds(pre.detach(), k, fold)
    return (pre.gather(1, columns) if pre.requires_grad else values), columns


def _fold(n_columns: int, k: int) -> int:
    """Return how many columns to take the maximum of, a divisor of `n_columns`; 1 where that saves nothing."""
    folds = [fold for fold in range(2, _LARGEST_FOLD + 1) if n_columns % fold == 0 and n_columns // fold >= k]
    costs = {fold: n_columns // fold + _GATHER_COST * k * fold for fold in folds}
    best = min(costs, key=costs.__getitem__, default=1)
    return best if costs.get(best, n_columns) < n_columns else 1


def _largest_by_folds(
    pre: Float[Tensor, "batch column"], k: int, fold: int
) -> tuple[Float[Tensor, "batch k"], Int[Tensor, "batch k"]]:
    """Return the k largest values of each row and their columns, ascending.

    Fold j holds the columns j, j + n_folds, j + 2 n_folds, …: the maximum is then one of contiguous pieces, and
    candidates taken piece by piece are in the order of columns.
    """
    n_rows, n_columns = pre.shape
    pieces = pre.reshape(n_rows, fold, n_columns // fold)
    folds = _largest(pieces.amax(1), k)
    candidates = pieces.gather(2, folds[:, None, :].expand(n_rows, fold, k)).view(n_rows, fold * k)
    places = _largest(candidates, k)
    columns = folds.gather(1, places % k) + (places // k) * pieces.shape[2]
    return candidates.gather(1, places), columns


def _largest(values: Float[Tensor, "batch column"], k: int) -> Int[Tensor, "batch k"]:
    """Return the columns of the k largest values of each row, ascending; on the CPU the first of equals at the edge."""
    n_rows, n_columns = values.shape
    if not is_numpys(values) or k > n_columns:
        return values.topk(k, dim=1, sorted=False).indices.sort(dim=1).values
    edge = _kth_largest(values, k)
    is_kept = torch.from_numpy(values.numpy() >= edge.numpy())
    positions = true_positions(is_kept)
    if positions.shape[0] != n_rows * k:
        rows = (is_kept.sum(1) != k).nonzero().squeeze(1)
        is_kept[rows] = _first_of_equals(values[rows], edge[rows], k)
        positions = true_positions(is_kept)
    if positions.shape[0] != n_rows * k:  # not a number is neither above nor below an edge
        return values.topk(k, dim=1, sorted=False).indices.sort(dim=1).values
    return positions.view(n_rows, k) % n_columns


def _kth_largest(values: Float[Tensor, "batch column"], k: int) -> Float[Tensor, "batch 1"]:
    if not is_numpys(values):
        return values.topk(k, dim=1, sorted=False).values.amin(1, keepdim=True)
    place = values.shape[1] - k
    return torch.from_numpy(np.partition(values.numpy(), place, axis=1)[:, place, None])


def _first_of_equals(values: Tensor, edge: Tensor, k: int) -> Bool[Tensor, "row column"]:
    is_above, is_equal = values > edge, values == edge
    return is_above | (is_equal & (is_equal.cumsum(1) <= k - is_above.sum(1, keepdim=True)))


class BatchSelection:
    """The `n_kept` largest values of a batch, of those above 0, while its rows come in chunks.

    Exact, and the same however the rows are cut: of equal values at the edge the first are kept. Held are at most
    `n_kept` values and positions between chunks, and twice as many while a chunk is looked at.
    """

    def __init__(self, n_rows: int, d_sae: int, n_kept: int) -> None:
        """Keep at most `n_kept` values of a batch of `n_rows` rows."""
        self._n_rows = n_rows
        self._d_sae = d_sae
        self._n_kept = n_kept
        self._n_seen = 0
        self._bound = 0.0
        self._positions: list[Tensor] = []
        self._values: list[Tensor] = []

    def add(self, pre: Float[Tensor, "chunk d_sae"]) -> None:
        """Look at the next rows."""
        flat = pre.detach().reshape(-1)
        positions = self._above(flat)
        self._positions.append(positions + self._n_seen)
        self._values.append(flat.index_select(0, positions))
        self._n_seen += flat.shape[0]
        self._prune()

    def result(self) -> tuple[Int[Tensor, " entry"], Float[Tensor, " entry"]]:
        """Return flat positions in the batch (int64, ascending) and values; raises IndexError before any rows came."""
        return self._positions[0], self._values[0]

    def code(self) -> SparseCode:
        """Return the same as a sparse code; raises IndexError before any rows came."""
        return SparseCode.from_positions(*self.result(), self._n_rows, self._d_sae)

    def _above(self, flat: Float[Tensor, " value"]) -> Int[Tensor, " entry"]:
        """Return positions of all values of a chunk that may be among the largest."""
        guess = _sampled_bound(flat, self._n_kept)
        if guess > self._bound:
            positions = true_positions(above(flat, guess))
            n_held = sum(n_true(above(values, guess)) for values in self._values)
            if n_held + positions.shape[0] >= self._n_kept:
                return positions
        return true_positions(above(flat, self._bound))

    def _prune(self) -> None:
        """Drop what is not among the largest so far."""
        positions, values = torch.cat(self._positions), torch.cat(self._values)
        if values.shape[0] >= self._n_kept:
            edge = _kth_largest(values[None], self._n_kept)[0, 0]
            self._bound = float(edge)
            if values.shape[0] > self._n_kept:
                is_kept = true_positions(_first_of_equals(values[None], edge[None, None], self._n_kept))
                positions, values = positions[is_kept], values[is_kept]
        self._positions, self._values = [positions], [values]


def _sampled_bound(flat: Float[Tensor, " value"], n_kept: int) -> float:
    """Return a value, at least 0, that probably somewhat more than `n_kept` entries exceed."""
    sample = flat[::_SAMPLE_STRIDE]
    share = n_kept / _SAMPLE_STRIDE
    rank = int(1.1 * share + 4 * share**0.5) + 4
    if rank >= sample.shape[0]:
        return 0.0
    return max(0.0, float(_kth_largest(sample[None], rank)))


def top_k_flat(pre: Float[Tensor, "batch d_sae"], n_kept: int) -> tuple[Int[Tensor, " entry"], Float[Tensor, " entry"]]:
    """Return flat positions (int64, ascending) and values of the `n_kept` largest values of a matrix, of those above 0.

    Exact; of equal values at the edge the first are kept.
    """
    n_rows, d_sae = pre.shape
    selection = BatchSelection(n_rows, d_sae, n_kept)
    selection.add(pre)
    return selection.result()
