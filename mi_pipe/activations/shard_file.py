"""A shard file, built in memory as the bytes that zarr-python would write, and written whole.

The buffer *is* the file: rows are filled in place through a strided view that skips the checksums, so a shard
is encoded without copying. Bytes: for each chunk its rows (little-endian, the last chunk padded with the fill
value) and their CRC-32C; then the index, one (offset, length) pair of uint64 a chunk (all ones for chunks
beyond the array's end), and its CRC-32C. Zarr v3 specification, "sharding_indexed" with codecs bytes and crc32c.
"""

import itertools

import google_crc32c
import numpy as np
from jaxtyping import Int, Shaped

from mi_pipe.activations.layout import CRC_BYTES, INDEX_ENTRY_BYTES, ArrayLayout
from mi_pipe.activations.storage_dtype import fill_value, numpy_dtype
from mi_pipe.core.checksum import chunked_checksum

_NO_CHUNK = np.iinfo(np.uint64).max


def crc32c(data: Shaped[np.ndarray, " byte"]) -> int:
    """Return the CRC-32C of some bytes."""
    # The library refuses memoryviews and takes contiguous arrays, as zarr-python passes them too.
    return google_crc32c.value(data)  # pyright: ignore[reportArgumentType]


class ShardBuffer:
    """One shard of one array, reused from shard to shard (allocating afresh costs more than filling)."""

    def __init__(self, layout: ArrayLayout) -> None:
        """Allocate the bytes of a full shard."""
        self.layout = layout
        self._bytes = np.empty(layout.file_bytes(layout.shard_rows), np.uint8)
        self._chunks = chunk_view(self._bytes, layout, layout.chunks_per_shard)

    def put(self, rows: Int[np.ndarray, " row"], values: Shaped[np.ndarray, "row width"]) -> None:
        """Write values at rows of this shard (ascending, counted from the shard's start)."""
        if len(rows) == 0:
            return
        chunk_rows = self.layout.chunk_rows
        breaks = np.flatnonzero((np.diff(rows) != 1) | (rows[1:] % chunk_rows == 0)) + 1
        edges = [0, *breaks.tolist(), len(rows)]
        for start, stop in itertools.pairwise(edges):
            chunk, within = divmod(int(rows[start]), chunk_rows)
            self._chunks[chunk, within : within + stop - start] = values[start:stop]

    def chunks(self, n_rows: int) -> list[Shaped[np.ndarray, "row width"]]:
        """Return views of the rows of the first `n_rows`, chunk by chunk."""
        size = self.layout.chunk_rows
        return [self._chunks[i, : min(size, n_rows - i * size)] for i in range(self.layout.n_chunks(n_rows))]

    def encode(self, n_rows: int) -> Shaped[np.ndarray, " byte"]:
        """Complete the first `n_rows` rows to a shard file: padding, checksums, index; valid until the next `put`."""
        layout = self.layout
        n_chunks = layout.n_chunks(n_rows)
        self._chunks[n_chunks - 1, n_rows - (n_chunks - 1) * layout.chunk_rows :] = fill_value(layout.store_dtype)
        data_bytes = layout.chunk_stride - CRC_BYTES
        index = np.full((layout.chunks_per_shard, 2), _NO_CHUNK, "<u8")
        for i in range(n_chunks):
            start = i * layout.chunk_stride
            self._append_crc(start, data_bytes)
            index[i] = start, layout.chunk_stride
        start = n_chunks * layout.chunk_stride
        n_index = layout.chunks_per_shard * INDEX_ENTRY_BYTES
        self._bytes[start : start + n_index] = index.reshape(-1).view(np.uint8)
        self._append_crc(start, n_index)
        return self._bytes[: layout.file_bytes(n_rows)]

    def checksum(self, n_rows: int) -> str:
        """Return the checksum of the file that `encode` has made, from those of its chunks."""
        data = self._bytes[: self.layout.file_bytes(n_rows)]
        return chunked_checksum(data, self.layout.chunk_stride, self.layout.n_chunks(n_rows))

    def _append_crc(self, start: int, n_bytes: int) -> None:
        end = start + n_bytes
        value = crc32c(self._bytes[start:end])
        self._bytes[end : end + CRC_BYTES] = np.frombuffer(value.to_bytes(CRC_BYTES, "little"), np.uint8)


def chunk_view(
    file_bytes: Shaped[np.ndarray, " byte"], layout: ArrayLayout, n_chunks: int
) -> Shaped[np.ndarray, "chunk row width"]:
    """View the bytes of a shard file as its chunks, without the checksums between them."""
    dtype = numpy_dtype(layout.store_dtype)
    return np.ndarray(
        (n_chunks, layout.chunk_rows, layout.width),
        dtype,
        buffer=file_bytes.data,
        strides=(layout.chunk_stride, layout.row_bytes, dtype.itemsize),
    )
