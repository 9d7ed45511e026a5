"""Reads the rows of one array straight from its shard files, without zarr's machinery (5 to 10 times the speed).

A chunk is compared with its CRC-32C when this object first touches it, and the CRC-32Cs of a shard with the checksum of
its file, if that is known; a missing, short, altered or exchanged shard raises ArtifactDamagedError, where zarr itself
would answer a missing file with the fill value.
"""

import json
from collections.abc import Mapping
from types import TracebackType

import numpy as np
from jaxtyping import Int, Shaped

from mi_pipe.activations.layout import CRC_BYTES, ArrayLayout
from mi_pipe.activations.row_array import read_rows, require_rows, take_rows
from mi_pipe.activations.shard_file import crc32c
from mi_pipe.activations.storage_dtype import StoreDType
from mi_pipe.core.checksum import is_same_file
from mi_pipe.core.errors import ArtifactDamagedError
from mi_pipe.core.place import OpenFile, Place


class RawArray:
    """One hook point's array in a group."""

    def __init__(
        self, group: Place, name: str, verify: bool = True, checksums: Mapping[str, str] | None = None
    ) -> None:
        """Open the array `name` of `group`; `checksums` has those of shard files by key (`core.checksum`).

        Raises ArtifactDamagedError if it is not laid out as mi_pipe writes.
        """
        self._group = group
        self.layout, self.n_rows = read_array_layout(group, name)
        n_chunks = -(-self.n_rows // self.layout.chunk_rows)
        self._is_verified = np.full(n_chunks, not verify)
        self._to_identify = dict(checksums or {})

    def read(self, start: int, stop: int) -> Shaped[np.ndarray, "row width"]:
        """Return stored rows `start` to `stop` (exclusive)."""
        return read_rows(self, start, stop)

    def read_into(self, out: Shaped[np.ndarray, "row width"], start: int) -> None:
        """Fill `out` (contiguous, of the stored dtype) with rows from `start` on; raises IndexError outside."""
        stop = start + len(out)
        require_rows(self, start, stop)
        size, row = self.layout.chunk_rows, start
        while row < stop:
            end = min(stop, (row // self.layout.shard_rows + 1) * self.layout.shard_rows)
            with _Shard(self._group, self.layout, row // self.layout.shard_rows, self.n_rows) as shard:
                self._identify(shard)
                while row < end:
                    part = min(end, (row // size + 1) * size)
                    self._read_chunk(shard, out[row - start : part - start], row)
                    row = part

    def take(self, rows: Int[np.ndarray, " row"]) -> Shaped[np.ndarray, "row width"]:
        """Return stored rows in any order, repeats allowed; each chunk that holds one is read once."""
        return take_rows(self, rows)

    def _identify(self, shard: "_Shard") -> None:
        """Compare a shard with the checksum of its file when it is first touched."""
        checksum = self._to_identify.get(shard.key)
        if checksum is not None:
            shard.identify(checksum)
            self._to_identify.pop(shard.key, None)

    def _read_chunk(self, shard: "_Shard", out: Shaped[np.ndarray, "row width"], row: int) -> None:
        """Read rows of one chunk, all of it if it is still to be verified."""
        layout = self.layout
        chunk, within = divmod(row, layout.chunk_rows)
        local = chunk % layout.chunks_per_shard
        if self._is_verified[chunk]:
            shard.read([out.data.cast("B")], local * layout.chunk_stride + within * layout.row_bytes)
            return
        whole = out if len(out) == layout.chunk_rows else np.empty((layout.chunk_rows, layout.width), out.dtype)
        shard.read_chunk(whole.reshape(-1).view(np.uint8), local)
        if whole is not out:
            out[:] = whole[within : within + len(out)]
        self._is_verified[chunk] = True


class _Shard:
    """An open shard file."""

    def __init__(self, group: Place, layout: ArrayLayout, shard: int, n_rows: int) -> None:
        self.key = layout.key(shard)
        self._name = f"{group.url}/{self.key}"
        self._layout = layout
        self._size = layout.file_bytes(min(layout.shard_rows, n_rows - shard * layout.shard_rows))
        try:
            self._opened = group.open(self.key)
        except FileNotFoundError as error:
            raise ArtifactDamagedError(f"{self._name} is missing.{_REMEDY}") from error

    def __enter__(self) -> "_Shard":
        self._file: OpenFile = self._opened.__enter__()
        if self._file.size != self._size:
            self.__exit__(None, None, None)
            raise ArtifactDamagedError(
                f"{self._name} has {self._file.size:,} bytes instead of {self._size:,}.{_REMEDY}"
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._opened.__exit__(kind, error, trace)

    def read(self, buffers: list[memoryview], offset: int) -> None:
        if self._file.read_into(buffers, offset) != sum(buffer.nbytes for buffer in buffers):
            raise ArtifactDamagedError(f"{self._name} ends early.{_REMEDY}")

    def identify(self, checksum: str) -> None:
        """Raise ArtifactDamagedError if the file is another than the one with this checksum."""
        if not is_same_file(self._file, checksum):
            raise ArtifactDamagedError(f"{self._name} is not the file that was published.{_REMEDY}")

    def read_chunk(self, out: Shaped[np.ndarray, " byte"], chunk: int) -> None:
        start = chunk * self._layout.chunk_stride
        stored = bytearray(CRC_BYTES)
        self.read([out.data, memoryview(stored)], start)
        if crc32c(out) != int.from_bytes(stored, "little"):
            raise ArtifactDamagedError(f"Chunk {chunk} of {self._name} differs from its checksum.{_REMEDY}")


_REMEDY = " `mi-pipe verify --deep` names all damage, `mi-pipe repair` mends it."


def read_array_layout(group: Place, name: str) -> tuple[ArrayLayout, int]:
    """Read an array's metadata; raises ArtifactDamagedError unless it is the sharded layout that mi_pipe writes."""
    path = f"{group.url}/{name}/zarr.json"
    try:
        meta = json.loads(group.read(f"{name}/zarr.json"))
        shape, codec = meta["shape"], meta["codecs"][0]
        inner = codec["configuration"]
        store_dtype: StoreDType = meta["attributes"].get("logical_dtype", meta["data_type"])
        layout = ArrayLayout(
            name=name,
            token_shape=tuple(meta["attributes"]["token_shape"]),
            dimension=meta["dimension_names"][1],
            store_dtype=store_dtype,
            chunk_rows=inner["chunk_shape"][0],
            shard_rows=meta["chunk_grid"]["configuration"]["chunk_shape"][0],
        )
        codecs = [item["name"] for item in inner["codecs"]]
        is_ours = codecs == ["bytes", "crc32c"] and inner["index_location"] == "end" and layout.width == shape[1]
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise ArtifactDamagedError(f"The metadata {path} cannot be read.{_REMEDY}") from error
    if not is_ours:
        raise ArtifactDamagedError(f"{path} describes no array that mi_pipe wrote (codecs {codecs}); use zarr.")
    return layout, shape[0]
