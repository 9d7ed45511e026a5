"""Which chunks of a Zarr array are really there: zarr-python answers a missing chunk with the fill value, silently.

A chunk that does not lie in a shard is there if its file is, and is not empty (an empty one reads as fill values too).
A chunk in a shard is there if the shard's index has an offset for it: the index is uint64 pairs (offset, length) at one
end of the file, 2^64 - 1 for what was never written (Zarr v3, "sharding_indexed"). Writers leave out chunks that hold
the fill value alone unless told otherwise (`write_empty_chunks`); these count as missing, since nothing tells them
from lost ones.
"""

import itertools
from typing import Any

import numpy as np
from jaxtyping import Bool

from mi_pipe.activations.layout import CRC_BYTES, INDEX_ENTRY_BYTES
from mi_pipe.core.errors import ArtifactDamagedError, ConfigError
from mi_pipe.core.place import Place

_NOT_WRITTEN = np.iinfo(np.uint64).max
_INDEX_CODECS = (["bytes", "crc32c"], ["bytes"])


class StoredChunks:
    """The chunks of one array in a group."""

    def __init__(self, group: Place, array: Any) -> None:
        """Look at `array`, a zarr-python array of `group`; raises ConfigError if its shards cannot be looked into."""
        self._group = group
        self._metadata = array.metadata
        self._name = str(array.path)
        self._shape = tuple(array.shape)
        self._chunks = tuple(array.chunks)
        self._files = tuple(array.shards or array.chunks)
        self._index = _index_layout(self._metadata, self._name) if array.shards else None
        self._looked_into: set[str] = set()

    def require(self, start: int, stop: int) -> None:
        """Raise ArtifactDamagedError unless every chunk with one of rows `start` to `stop` (exclusive) is there."""
        if start >= stop:
            return
        rows = range(start // self._files[0], -(-stop // self._files[0]))
        others = [range(-(-n // size)) for n, size in zip(self._shape[1:], self._files[1:], strict=True)]
        for place in itertools.product(rows, *others):
            self._require_file(place)

    def _require_file(self, place: tuple[int, ...]) -> None:
        key = f"{self._name}/{self._metadata.encode_chunk_key(place)}"
        size = self._group.size(key)
        if not size:
            raise ArtifactDamagedError(f"{self._group.url}/{key} is {'missing' if size is None else 'empty'}.")
        if self._index is not None and key not in self._looked_into:
            if not self._are_written(key, size, place).all():
                raise ArtifactDamagedError(
                    f"{self._group.url}/{key} lacks chunks: they were never written, or hold the fill value alone and "
                    "were left out. Write the array with write_empty_chunks=True."
                )
            self._looked_into.add(key)

    def _are_written(self, key: str, size: int, place: tuple[int, ...]) -> Bool[np.ndarray, " chunk"]:
        """Return which of a shard's chunks are written, of those that begin within the array."""
        assert self._index is not None
        per_file = [file // chunk for file, chunk in zip(self._files, self._chunks, strict=True)]
        n_bytes = int(np.prod(per_file)) * INDEX_ENTRY_BYTES
        stored = bytearray(n_bytes)
        with self._group.open(key) as file:
            start = 0 if self._index.is_at_start else size - n_bytes - self._index.tail_bytes
            if start < 0 or file.read_into([memoryview(stored)], start) != n_bytes:
                raise ArtifactDamagedError(f"{self._group.url}/{key} has {size:,} bytes, too few for its index.")
        offsets = np.frombuffer(stored, "<u8").reshape(*per_file, 2)[..., 0]
        within = [
            -(-(n - i * file) // chunk)
            for n, i, file, chunk in zip(self._shape, place, self._files, self._chunks, strict=True)
        ]
        return offsets[tuple(slice(0, n) for n in within)].reshape(-1) != _NOT_WRITTEN


class _IndexLayout:
    """Where a shard's index lies."""

    def __init__(self, is_at_start: bool, tail_bytes: int) -> None:
        self.is_at_start = is_at_start
        self.tail_bytes = tail_bytes


def _index_layout(metadata: Any, name: str) -> _IndexLayout:
    """Return where the index lies; raises ConfigError unless it is encoded as nearly everyone does."""
    codecs = metadata.to_dict()["codecs"]
    sharding = codecs[0]["configuration"]
    index_codecs = [codec["name"] for codec in sharding["index_codecs"]]
    inner = [codec["name"] for codec in sharding["codecs"]]
    if len(codecs) != 1 or index_codecs not in _INDEX_CODECS or "sharding_indexed" in inner:
        raise ConfigError(
            f"The shards of {name} are encoded in a way in which missing chunks cannot be told from written ones "
            f"(index {index_codecs}, chunks {inner}). Copy the array to shards with the usual index, or to none."
        )
    return _IndexLayout(sharding.get("index_location", "end") == "start", CRC_BYTES * ("crc32c" in index_codecs))
