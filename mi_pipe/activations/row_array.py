"""What readers need of one hook point's stored rows, whoever wrote them."""

import itertools
from typing import Protocol

import numpy as np
from jaxtyping import Int, Shaped

from mi_pipe.activations.layout import ArrayLayout
from mi_pipe.activations.storage_dtype import numpy_dtype


class RowArray(Protocol):
    """Rows (token, width) as they are stored; several threads may read at once.

    What cannot be read whole and unaltered raises ArtifactDamagedError.
    """

    layout: ArrayLayout
    n_rows: int

    def read(self, start: int, stop: int) -> Shaped[np.ndarray, "row width"]:
        """Return rows `start` to `stop` (exclusive); raises IndexError outside."""
        ...

    def read_into(self, out: Shaped[np.ndarray, "row width"], start: int) -> None:
        """Fill `out` (contiguous, of the stored dtype) with rows from `start` on; raises IndexError outside."""
        ...

    def take(self, rows: Int[np.ndarray, " row"]) -> Shaped[np.ndarray, "row width"]:
        """Return rows in any order, repeats allowed; raises IndexError outside."""
        ...


def read_rows(array: RowArray, start: int, stop: int) -> Shaped[np.ndarray, "row width"]:
    """Return rows `start` to `stop` (exclusive) of an array in memory of their own."""
    out = np.empty((max(0, stop - start), array.layout.width), numpy_dtype(array.layout.store_dtype))
    array.read_into(out, start)
    return out


def require_rows(array: RowArray, start: int, stop: int) -> None:
    """Raise IndexError unless an array has rows `start` to `stop` (exclusive)."""
    if start < 0 or stop > array.n_rows:
        raise IndexError(f"rows {start} to {stop} of {array.layout.name}, which has {array.n_rows}")


def take_rows(array: RowArray, rows: Int[np.ndarray, " row"]) -> Shaped[np.ndarray, "row width"]:
    """Return rows of an array in any order, repeats allowed; of each chunk, what lies between the wanted rows."""
    rows = np.asarray(rows, np.int64)
    out = np.empty((len(rows), array.layout.width), numpy_dtype(array.layout.store_dtype))
    order = np.argsort(rows, kind="stable")
    _, starts = np.unique(rows[order] // array.layout.chunk_rows, return_index=True)
    edges = [*starts.tolist(), len(rows)]
    for first, last in itertools.pairwise(edges):
        places = order[first:last]
        low, high = int(rows[places[0]]), int(rows[places[-1]]) + 1
        out[places] = array.read(low, high)[rows[places] - low]
    return out
