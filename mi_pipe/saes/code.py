"""The sparse code of a batch: which features are active in which row, and how strongly.

It is a CSR matrix (batch, d_sae) kept as three flat tensors, because every product of a training step is
then a sum over active entries only: decoding sums over a row's features, a weight gradient sums over a
feature's rows.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mi_pipe.saes.row_blocks import map_row_blocks

# On the CPU, numpy compares, counts and finds true entries three to five times as fast as torch.
_NUMPY_DTYPES = (torch.float32, torch.float64)


def is_numpys(values: Tensor) -> bool:
    """Say whether numpy can work on a tensor in place."""
    return values.device.type == "cpu" and values.dtype in _NUMPY_DTYPES


def above(values: Float[Tensor, "*shape"], bound: float | Tensor) -> Bool[Tensor, "*shape"]:
    """Say of each value whether it exceeds a bound (a number, or a tensor that broadcasts)."""
    if not is_numpys(values):
        return values > bound
    other = bound.detach().numpy() if isinstance(bound, Tensor) else bound
    return torch.from_numpy(values.detach().numpy() > other)


def n_true(mask: Bool[Tensor, "*shape"]) -> int:
    """Return how many entries are true."""
    return int(np.count_nonzero(mask.numpy()) if mask.device.type == "cpu" else torch.count_nonzero(mask))


def true_positions(mask: Bool[Tensor, "*shape"]) -> Int[Tensor, " entry"]:
    """Return the flat positions (int64, ascending) of the true entries."""
    if mask.device.type == "cpu":
        return torch.from_numpy(np.flatnonzero(mask.numpy()))
    return mask.reshape(-1).nonzero().squeeze(1)


def positions_above(
    values: Float[Tensor, "row column"], bound: float | Float[Tensor, "*column"]
) -> Int[Tensor, " entry"]:
    """Return the flat positions (int64, ascending) of the values above a bound (one number, or one a column)."""
    if not is_numpys(values):
        return true_positions(values > bound)
    array, width = values.detach().numpy(), values.shape[1]
    other = bound.detach().numpy() if isinstance(bound, Tensor) else bound

    def look(rows: slice) -> Int[np.ndarray, " entry"]:
        return np.flatnonzero(array[rows] > other) + rows.start * width

    return torch.from_numpy(np.concatenate(map_row_blocks(look, len(array), width)))


@dataclass(frozen=True)
class SparseCode:
    """Active features of a batch, row after row; entries with value 0 may occur and count as inactive."""

    row_starts: Int[Tensor, " rows_plus_one"]
    """int32; row b holds entries row_starts[b] to row_starts[b + 1]."""
    features: Int[Tensor, " entry"]
    """int32 index of each entry's feature."""
    values: Float[Tensor, " entry"]
    """Activation of each entry, at least 0."""
    d_sae: int

    @classmethod
    def from_rows(cls, features: Int[Tensor, "batch k"], values: Float[Tensor, "batch k"], d_sae: int) -> "SparseCode":
        """Make a code with the same number of entries in every row."""
        n_rows, k = features.shape
        starts = torch.arange(0, n_rows * k + 1, k, dtype=torch.int32, device=features.device)
        return cls(starts, features.reshape(-1).to(torch.int32), values.reshape(-1), d_sae)

    @classmethod
    def from_positions(
        cls, positions: Int[Tensor, " entry"], values: Float[Tensor, " entry"], n_rows: int, d_sae: int
    ) -> "SparseCode":
        """Make a code of entries at flat positions row * d_sae + feature (int64, ascending)."""
        bounds = torch.arange(n_rows + 1, device=positions.device) * d_sae
        starts = torch.searchsorted(positions, bounds, out_int32=True)
        return cls(starts, (positions % d_sae).to(torch.int32), values, d_sae)

    @classmethod
    def above(cls, dense: Float[Tensor, "batch d_sae"], bound: float | Float[Tensor, "*d_sae"]) -> "SparseCode":
        """Make a code of the entries of a matrix above a bound (one number, or one a feature)."""
        positions = positions_above(dense, bound)
        n_rows, d_sae = dense.shape
        return cls.from_positions(positions, dense.reshape(-1).index_select(0, positions), n_rows, d_sae)

    @property
    def n_rows(self) -> int:
        """Number of rows of the batch."""
        return self.row_starts.shape[0] - 1

    def with_values(self, values: Float[Tensor, " entry"]) -> "SparseCode":
        """Return a code with the same entries and other values."""
        return SparseCode(self.row_starts, self.features, values, self.d_sae)

    def entry_rows(self) -> Int[Tensor, " entry"]:
        """Return the row of each entry, int32."""
        rows = torch.arange(self.n_rows, dtype=torch.int32, device=self.features.device)
        return rows.repeat_interleave(self.row_starts.diff(), output_size=self.features.shape[0])

    def n_active(self) -> Int[Tensor, ""]:
        """Return the number of entries above 0."""
        return torch.count_nonzero(self.values)

    def n_fired(self) -> Int[Tensor, " d_sae"]:
        """Return in how many rows each feature is above 0, int64."""
        counts = torch.zeros(self.d_sae, dtype=torch.int64, device=self.features.device)
        return counts.index_add_(0, self.features, (self.values > 0).to(torch.int64))

    def dense(self) -> Float[Tensor, "batch d_sae"]:
        """Return the code as a dense matrix (for tests and small batches)."""
        out = self.values.new_zeros(self.n_rows, self.d_sae)
        return out.index_put_((self.entry_rows().long(), self.features.long()), self.values, accumulate=True)

    def by_feature(self) -> "FeatureOrder":
        """Return the entries' order by feature: the transposed pattern."""
        _, order = torch.sort(self.features, stable=True)
        counts = torch.bincount(self.features, minlength=self.d_sae)
        starts = torch.zeros(self.d_sae + 1, dtype=torch.int32, device=self.features.device)
        starts[1:] = counts.cumsum(0)
        return FeatureOrder(starts, self.entry_rows()[order], order)


@dataclass(frozen=True)
class FeatureOrder:
    """The entries of a code sorted by feature."""

    feature_starts: Int[Tensor, " features_plus_one"]
    rows: Int[Tensor, " entry"]
    """int32 row of each entry, in feature order."""
    order: Int[Tensor, " entry"]
    """Position in the code of each entry, in feature order."""
