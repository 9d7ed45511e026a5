"""Where rows lie: chunks within shards within arrays, one array a hook point; arithmetic only.

A row is one kept token. All hook points share `shard_rows` (S), so that shard i is rows [iS, (i+1)S) of every
array and one unit of work. A shard file holds chunks of `chunk_rows` (C) rows, each followed by its CRC-32C,
then an index (offset and length of each chunk) and the index's CRC-32C: Zarr v3's `sharding_indexed`.
C and S are powers of two near the measured knees: about 2 MB a chunk, at most 134 MB a shard of the widest
hook point; small stores get smaller shards, so that a killed harvest has units to resume from.
"""

from dataclasses import dataclass

import numpy as np

from mi_pipe.activations.storage_dtype import StoreDType, numpy_dtype

CRC_BYTES = 4
INDEX_ENTRY_BYTES = 16

_CHUNK_BYTES = 2_500_000
_SHARD_BYTES = 1 << 27
_MIN_SHARD_ROWS = 256
_SHARDS_OF_SMALL_STORE = 16


@dataclass(frozen=True)
class ArrayLayout:
    """The layout of one hook point's array (n_rows, width)."""

    name: str
    token_shape: tuple[int, ...]
    """Shape of one token's value in the model, such as (d_model,) or (n_heads, d_head); stored flat."""
    dimension: str
    """Name of the second dimension."""
    store_dtype: StoreDType
    chunk_rows: int
    shard_rows: int

    @property
    def width(self) -> int:
        """Values a row."""
        return int(np.prod(self.token_shape, dtype=np.int64))

    @property
    def row_bytes(self) -> int:
        """Bytes a row."""
        return self.width * numpy_dtype(self.store_dtype).itemsize

    @property
    def chunks_per_shard(self) -> int:
        """Chunks of a full shard; the index has this many entries in every shard."""
        return self.shard_rows // self.chunk_rows

    @property
    def chunk_stride(self) -> int:
        """Bytes from one chunk to the next within a shard file."""
        return self.chunk_rows * self.row_bytes + CRC_BYTES

    @property
    def index_bytes(self) -> int:
        """Bytes of the index with its checksum."""
        return self.chunks_per_shard * INDEX_ENTRY_BYTES + CRC_BYTES

    def n_chunks(self, n_rows: int) -> int:
        """Return how many chunks a shard of `n_rows` rows has on disk."""
        return -(-n_rows // self.chunk_rows)

    def file_bytes(self, n_rows: int) -> int:
        """Return the size of a shard file of `n_rows` rows (its last chunk is padded)."""
        return self.n_chunks(n_rows) * self.chunk_stride + self.index_bytes

    def key(self, shard: int) -> str:
        """Return the shard's key in the group, which is also its path."""
        return f"{self.name}/c/{shard}/0"


@dataclass(frozen=True)
class StoreLayout:
    """The layout of all arrays of a store."""

    n_rows: int
    shard_rows: int
    arrays: tuple[ArrayLayout, ...]
    with_covariance: frozenset[str] = frozenset()
    """Arrays whose covariance is kept with the statistics."""

    @property
    def n_shards(self) -> int:
        """Number of shards of every array."""
        return -(-self.n_rows // self.shard_rows)

    def bounds(self, shard: int) -> tuple[int, int]:
        """Return the first row of a shard and the row after its last."""
        return shard * self.shard_rows, min(self.n_rows, (shard + 1) * self.shard_rows)

    def shard_n_rows(self, shard: int) -> int:
        """Return how many rows a shard holds."""
        start, stop = self.bounds(shard)
        return stop - start

    @property
    def size_bytes(self) -> int:
        """Bytes of all shard files."""
        return sum(array.file_bytes(self.shard_n_rows(i)) for i in range(self.n_shards) for array in self.arrays)


def chunk_rows_for(row_bytes: int, shard_rows: int) -> int:
    """Return the rows of a chunk: a power of two, at most about 2.5 MB, at most a shard.

    >>> chunk_rows_for(1152, 65536), chunk_rows_for(8192, 16384)
    (2048, 256)
    """
    return min(shard_rows, power_of_two_below(max(1, _CHUNK_BYTES // row_bytes)))


def shard_rows_for(n_rows: int, widest_row_bytes: int, n_tokens: int | None = None) -> int:
    """Return the rows of a shard: a power of two, at most 134 MB of the widest array; small stores about 16 shards.

    Where only some of `n_tokens` become rows, a shard has no more tokens to run than it would have rows: that bounds
    the work that a kill can lose.

    >>> shard_rows_for(100_000_000, 1152), shard_rows_for(100_000_000, 8192), shard_rows_for(100_000, 128)
    (65536, 16384, 8192)
    >>> shard_rows_for(1_000_000, 1152, n_tokens=128_000_000)
    512
    """
    tokens_a_row = max(1.0, (n_tokens or n_rows) / n_rows)
    largest = power_of_two_below(max(1, int(_SHARD_BYTES // widest_row_bytes / tokens_a_row)))
    fair = power_of_two_below(max(1, 2 * (n_rows // _SHARDS_OF_SMALL_STORE) - 1))
    return min(largest, max(fair, min(_MIN_SHARD_ROWS, largest)))


def power_of_two_below(n: int) -> int:
    """Return the largest power of two that is at most `n` (at least 1)."""
    return 1 << (n.bit_length() - 1)
