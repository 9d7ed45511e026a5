"""Rows of a hook point in their order, block by block, in memory that does not depend on how many there are."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from mi_pipe.activations.row_array import RowArray
from mi_pipe.activations.storage_dtype import decode, numpy_dtype


class Block(NamedTuple):
    """Some rows, ascending, and their values."""

    rows: Int[np.ndarray, " row"]
    values: Float[np.ndarray, "row width"]
    """float32; overwritten when the next block is asked for."""


def read_blocks(array: RowArray, n_block_rows: int, chosen: Int[np.ndarray, " row"] | None = None) -> Iterator[Block]:
    """Yield all rows, or the `chosen` ones (ascending), in blocks of at most `n_block_rows`.

    Whole chunks are read where blocks are smaller than these, so each chunk is read and decoded once. A block lies
    within a stretch of the array that is as long as a block or a chunk, and is left out if it has no chosen row.
    """
    layout = array.layout
    stretch = layout.chunk_rows * max(1, n_block_rows // layout.chunk_rows)
    stored = np.empty((min(stretch, array.n_rows), layout.width), numpy_dtype(layout.store_dtype))
    picked = stored if chosen is None else np.empty((min(n_block_rows, len(stored)), layout.width), stored.dtype)
    values = np.empty((min(n_block_rows, len(stored)), layout.width), np.float32)
    for start in range(0, array.n_rows, stretch):
        stop = min(start + stretch, array.n_rows)
        rows = np.arange(start, stop) if chosen is None else _within(chosen, start, stop)
        if not len(rows):
            continue
        first, n_read = int(rows[0]), int(rows[-1] - rows[0]) + 1
        array.read_into(stored[:n_read], first)
        for low in range(0, len(rows), n_block_rows):
            part = rows[low : low + n_block_rows]
            if n_read == len(rows):
                found = stored[low : low + len(part)]
            else:
                found = np.take(stored, part - first, axis=0, out=picked[: len(part)], mode="clip")
            yield Block(part, decode(found, layout.store_dtype, values[: len(part)]))


def _within(chosen: Int[np.ndarray, " row"], start: int, stop: int) -> Int[np.ndarray, " row"]:
    low, high = np.searchsorted(chosen, [start, stop])
    return chosen[low:high]
