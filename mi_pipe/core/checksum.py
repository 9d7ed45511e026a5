"""Checksums of files: computed in blocks, and for readers once a process.

`sha256:<hex>` is of all bytes: tables, metadata, everything small.

`crc32c-chunks:<n>x<m>:<hex>` is of files that are m chunks of n bytes, each ending in the CRC-32C of what is before it,
and a tail: SHA-256 of these CRC-32Cs and the tail. It names the content as the SHA-256 of all bytes would, costs
nothing where the CRC-32Cs are there, and two files are told apart without reading their rows.

`crc32c:<hex>` is of all bytes, for shards of version 1. It does not tell one such file from another: the CRC-32C of
anything followed by its own CRC-32C is always the same.
"""

import hashlib
from typing import Any, Protocol

import google_crc32c
import numpy as np
from jaxtyping import UInt8

from mi_pipe.core.place import LocalPlace, OpenFile, Place

CHUNKS = "crc32c-chunks"
_CRC_BYTES = 4
_BLOCK_BYTES = 1 << 22
_whole: set[tuple[object, ...]] = set()


def chunked_checksum(data: UInt8[np.ndarray, " byte"], chunk_bytes: int, n_chunks: int) -> str:
    """Return the `crc32c-chunks` checksum of a file whose chunks already end in their CRC-32C."""
    end = n_chunks * chunk_bytes
    words = data[:end].reshape(n_chunks, chunk_bytes)[:, -_CRC_BYTES:].tobytes()
    return f"{CHUNKS}:{chunk_bytes}x{n_chunks}:{hashlib.sha256(words + data[end:].tobytes()).hexdigest()}"


def is_same_file(file: OpenFile, checksum: str) -> bool:
    """Say whether an open file is the one with this `crc32c-chunks` checksum, its rows left unread.

    With this known, each chunk can be trusted once it agrees with its own CRC-32C. True for other kinds of checksums.
    """
    kind, chunks, value = _parts(checksum)
    if kind != CHUNKS:
        return True
    chunk_bytes, n_chunks = (int(number) for number in chunks.split("x"))
    ends = [(chunk + 1) * chunk_bytes - _CRC_BYTES for chunk in range(n_chunks)]
    tail_bytes = file.size - n_chunks * chunk_bytes
    if tail_bytes < 0:
        return False
    pieces = [*file.read_pieces(ends, _CRC_BYTES), *file.read_pieces([n_chunks * chunk_bytes], tail_bytes)]
    return hashlib.sha256(b"".join(pieces)).hexdigest() == value


def matches(place: Place, name: str, checksum: str) -> bool:
    """Say whether a file exists and has the checksum; reads all of it."""
    hasher, block_bytes, value = _hasher(checksum)
    try:
        with place.open(name) as file:
            block = np.empty(min(block_bytes, max(1, file.size)), np.uint8)
            for start in range(0, file.size, len(block)):
                hasher.update(block[: file.read_into([block.data], start)])
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return False
    return hasher.hexdigest() == value


def data_matches(data: bytes | UInt8[np.ndarray, " byte"], checksum: str) -> bool:
    """Say whether bytes in memory have the checksum."""
    hasher, block_bytes, value = _hasher(checksum)
    content = np.frombuffer(data, np.uint8)
    for start in range(0, len(content), block_bytes):
        hasher.update(content[start : start + block_bytes])
    return hasher.hexdigest() == value


def matches_once(place: Place, name: str, checksum: str) -> bool:
    """Say the same as `matches`, reading a file once a process, and again when it has changed."""
    key = _identity(place, name, checksum)
    if key is None:
        return False
    if key not in _whole:
        if not matches(place, name, checksum):
            return False
        _whole.add(key)
    return True


def forget() -> None:
    """Check every file anew, as a new process would."""
    _whole.clear()


class _Hasher(Protocol):
    def update(self, data: Any, /) -> None: ...
    def hexdigest(self) -> str: ...


class _Crc32c:
    def __init__(self) -> None:
        self._value = 0

    def update(self, data: Any, /) -> None:
        # The library refuses memoryviews and takes contiguous arrays.
        self._value = google_crc32c.extend(self._value, data)

    def hexdigest(self) -> str:
        return f"{self._value:08x}"


class _Chunks:
    """Takes a file chunk by chunk; has no value if a chunk differs from its CRC-32C."""

    def __init__(self, chunk_bytes: int, n_chunks: int) -> None:
        self._chunk_bytes = chunk_bytes
        self._n_left = n_chunks
        self._is_whole = True
        self._hash = hashlib.sha256()

    def update(self, data: Any, /) -> None:
        if not self._n_left:
            self._hash.update(data)
            return
        self._n_left -= 1
        word = data[-_CRC_BYTES:].tobytes()
        found = google_crc32c.value(data[:-_CRC_BYTES]).to_bytes(_CRC_BYTES, "little")
        self._is_whole &= len(data) == self._chunk_bytes and found == word
        self._hash.update(word)

    def hexdigest(self) -> str:
        return self._hash.hexdigest() if self._is_whole and not self._n_left else ""


def _hasher(checksum: str) -> tuple[_Hasher, int, str]:
    """Return what computes a kind of checksum, the size of the blocks it takes, and the value to be had."""
    kind, chunks, value = _parts(checksum)
    if kind == CHUNKS:
        chunk_bytes, n_chunks = (int(number) for number in chunks.split("x"))
        return _Chunks(chunk_bytes, n_chunks), chunk_bytes, value
    return (_Crc32c() if kind == "crc32c" else hashlib.sha256()), _BLOCK_BYTES, value


def _parts(checksum: str) -> tuple[str, str, str]:
    kind, _, rest = checksum.partition(":")
    chunks, _, value = rest.rpartition(":")
    return kind, chunks, value


def _identity(place: Place, name: str, checksum: str) -> tuple[object, ...] | None:
    if not isinstance(place, LocalPlace):
        return place.url, name, checksum
    try:
        stat = (place.root / name).stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return str(place.root), name, checksum, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns
