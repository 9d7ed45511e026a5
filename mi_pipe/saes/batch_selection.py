"""Selection of the largest pre-activations of a whole batch that comes in chunks of rows, exact.

A sample of the first chunk gives a bound that somewhat more values exceed than are sought; a chunk that comes later
need only beat the smallest value that is kept so far. So all but a few values are looked at once, in a comparison.
"""

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mi_pipe.saes.code import SparseCode, above, is_numpys, n_true, positions_above, true_positions

_SAMPLE_STRIDE = 61


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
        pre = pre.detach()
        positions = self._above(pre)
        self._positions.append(positions + self._n_seen)
        self._values.append(pre.reshape(-1).index_select(0, positions))
        self._n_seen += pre.numel()
        self._prune()

    def result(self) -> tuple[Int[Tensor, " entry"], Float[Tensor, " entry"]]:
        """Return flat positions in the batch (int64, ascending) and values; raises IndexError before any rows came."""
        return self._positions[0], self._values[0]

    def code(self) -> SparseCode:
        """Return the same as a sparse code; raises IndexError before any rows came."""
        return SparseCode.from_positions(*self.result(), self._n_rows, self._d_sae)

    def _above(self, pre: Float[Tensor, "chunk d_sae"]) -> Int[Tensor, " entry"]:
        """Return positions of all values of a chunk that may be among the largest."""
        guess = _sampled_bound(pre.reshape(-1), self._n_kept)
        if guess > self._bound:
            positions = positions_above(pre, guess)
            n_held = sum(n_true(above(values, guess)) for values in self._values)
            if n_held + positions.shape[0] >= self._n_kept:
                return positions
        return positions_above(pre, self._bound)

    def _prune(self) -> None:
        """Drop what is not among the largest so far; of equal values at the edge, the last."""
        positions, values = torch.cat(self._positions), torch.cat(self._values)
        if values.shape[0] >= self._n_kept:
            self._bound = _kth_largest(values, self._n_kept)
            if values.shape[0] > self._n_kept:
                is_kept = above(values, self._bound)
                ties = true_positions(values == self._bound)
                is_kept[ties[: self._n_kept - n_true(is_kept)]] = True
                kept = true_positions(is_kept)
                positions, values = positions[kept], values[kept]
        self._positions, self._values = [positions], [values]


def _kth_largest(values: Float[Tensor, " value"], k: int) -> float:
    if not is_numpys(values):
        return float(values.topk(k, sorted=False).values.min())
    place = values.shape[0] - k
    return float(np.partition(values.numpy(), place)[place])


def _sampled_bound(flat: Float[Tensor, " value"], n_kept: int) -> float:
    """Return a value, at least 0, that probably somewhat more than `n_kept` entries exceed."""
    sample = flat[::_SAMPLE_STRIDE]
    share = n_kept / _SAMPLE_STRIDE
    rank = int(1.1 * share + 4 * share**0.5) + 4
    return max(0.0, _kth_largest(sample, rank)) if rank < sample.shape[0] else 0.0


def top_k_flat(pre: Float[Tensor, "batch d_sae"], n_kept: int) -> tuple[Int[Tensor, " entry"], Float[Tensor, " entry"]]:
    """Return flat positions (int64, ascending) and values of the `n_kept` largest values of a matrix, of those above 0.

    Exact; of equal values at the edge the first are kept.
    """
    n_rows, d_sae = pre.shape
    selection = BatchSelection(n_rows, d_sae, n_kept)
    selection.add(pre)
    return selection.result()
