"""Sparse latents on disk: one Parquet file a block of rows, readable by feature.

A file holds `feature` int32, `row` int64, `activation` float32, sorted by feature and then by row. Row groups
are small, so that their statistics let any Parquet reader fetch one feature without reading the others:
`pd.read_parquet(folder, filters=[("feature", "==", 7)])`. About 5 bytes a firing.

A block is the unit that a killed run need not do again; a range of features over all blocks is the unit in
which features are scored, so memory is bounded by `MAX_FIRINGS`, or by the most frequent single feature.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Int

from mi_pipe.core.atomic import atomic_path
from mi_pipe.features.firings import Firings, joined, starts_of

BLOCK_ROWS = 1 << 15
"""Rows of the activation store in one file."""
MAX_FIRINGS = 1 << 23
"""Firings scored at once."""
MAX_FEATURES = 1 << 12
"""Features scored at once."""
_ROW_GROUP = 1 << 16


def block_ranges(n_rows: int) -> list[tuple[int, int]]:
    """Return the (first, one past last) row of each block."""
    return [(start, min(start + BLOCK_ROWS, n_rows)) for start in range(0, n_rows, BLOCK_ROWS)]


def block_name(block: int) -> str:
    """Return the file name of a block."""
    return f"{block:06d}.parquet"


def write_latents(path: Path, firings: Firings) -> None:
    """Write one block durably; the bytes depend on the firings alone."""
    table = pa.table(
        {"feature": firings.feature.astype(np.int32), "row": firings.row, "activation": firings.activation}
    )
    with atomic_path(path) as temp:
        pq.write_table(
            table,
            temp,
            row_group_size=_ROW_GROUP,
            compression="zstd",
            compression_level=1,
            use_dictionary=["feature"],  # pyright: ignore[reportArgumentType] (its stub knows only bool)
            column_encoding={"row": "DELTA_BINARY_PACKED"},
        )


def feature_counts(paths: Sequence[Path], d_sae: int) -> Int[np.ndarray, " feature"]:
    """Return how often each feature fires over all blocks."""
    total = np.zeros(d_sae, np.int64)
    for path in paths:
        feature = pq.read_table(path, columns=["feature"])["feature"].to_numpy()
        total += np.bincount(feature, minlength=d_sae)
    return total


def feature_ranges(counts: Int[np.ndarray, " feature"]) -> Iterator[tuple[int, int]]:
    """Yield successive (first, one past last) features that together fire at most MAX_FIRINGS times.

    A single feature that fires more often is a range of its own.
    """
    first = 0
    total = np.concatenate([[0], np.cumsum(counts)])
    while first < len(counts):
        fitting = int(np.searchsorted(total, total[first] + MAX_FIRINGS, side="right")) - 1
        last = min(max(fitting, first + 1), first + MAX_FEATURES, len(counts))
        yield first, last
        first = last


def read_latents(paths: Sequence[Path], first: int, last: int) -> Firings:
    """Return the firings of features `first` up to but not including `last`, from blocks in row order."""
    return joined([_read_block(path, first, last) for path in paths])


def _read_block(path: Path, first: int, last: int) -> Firings:
    filters = [("feature", ">=", first), ("feature", "<", last)]
    table = pq.read_table(path, filters=filters)
    feature = table["feature"].to_numpy() - first
    return Firings(first, starts_of(feature, last - first), table["row"].to_numpy(), table["activation"].to_numpy())
