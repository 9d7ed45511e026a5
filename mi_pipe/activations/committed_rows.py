"""Rows of an unfinished store: those of committed shards, and a refusal or NaN for all others.

zarr-python would answer a shard that is not there with NaN too, but silently, and without looking at the rest.
"""

from typing import TYPE_CHECKING, NoReturn

import numpy as np
from jaxtyping import Int, Shaped

from mi_pipe.activations.raw_array import RawArray
from mi_pipe.activations.row_array import take_rows
from mi_pipe.activations.storage_dtype import decode, numpy_dtype
from mi_pipe.core.checked_zarr import CheckedStore
from mi_pipe.core.errors import ArtifactIncompleteError

if TYPE_CHECKING:
    from mi_pipe.activations.partial import PartialStore


NOT_COMMITTED = ""
"""Stands for the checksum of a shard without a commit record; no file has it."""


class CommittedRows:
    """Rows of one hook point; asked for one that is not there, it raises ArtifactIncompleteError."""

    def __init__(self, array: RawArray, store: "PartialStore") -> None:
        """Read `array` of `store`."""
        self.layout, self.n_rows = array.layout, array.n_rows
        self._array = array
        self._store = store

    def read(self, start: int, stop: int) -> Shaped[np.ndarray, "row width"]:
        """Return rows `start` to `stop` (exclusive)."""
        self._require(start, stop)
        return self._array.read(start, stop)

    def read_into(self, out: Shaped[np.ndarray, "row width"], start: int) -> None:
        """Fill `out` with rows from `start` on."""
        self._require(start, start + len(out))
        self._array.read_into(out, start)

    def take(self, rows: Int[np.ndarray, " row"]) -> Shaped[np.ndarray, "row width"]:
        """Return rows in any order."""
        return take_rows(self, rows)

    def _require(self, start: int, stop: int) -> None:
        missing = np.flatnonzero(~self._store.available[start:stop])
        if len(missing):
            self._store.refuse(f"Row {start + int(missing[0]):,} of {self.layout.name}")


class MaskedRows:
    """A hook point as dask slices it, NaN where rows are missing."""

    ndim = 2

    def __init__(self, store: "PartialStore", hook: str) -> None:
        """Slice one hook point of `store`."""
        self._store = store
        self._hook = hook
        self.shape = (store.n_rows, store.width(hook))
        self.dtype = np.dtype(np.float32) if store.dtype == "bfloat16" else numpy_dtype(store.dtype)

    def __getitem__(self, index: tuple[slice, slice]) -> Shaped[np.ndarray, "row width"]:
        """Return rows as they are stored; bfloat16 in float32."""
        picked, columns = index
        rows = np.arange(*picked.indices(self.shape[0]))
        is_there = self._store.available[rows]
        out = np.full((len(rows), self.shape[1]), np.nan, self.dtype)
        stored = self._store.array(self._hook).take(rows[is_there])
        out[is_there] = decode(stored, "bfloat16") if self._store.dtype == "bfloat16" else stored
        return out[:, columns]


class PartialGroup(CheckedStore):
    """A group in which a shard that is not committed raises ArtifactIncompleteError, also if its file is there."""

    def _refuse(self, key: str) -> NoReturn:
        if self._checksums.get(key) in (None, NOT_COMMITTED):
            raise ArtifactIncompleteError(
                f"{self._place.url}/{key} is not there yet: {self._artifact} is not finished."
            )
        super()._refuse(key)
