"""Checksums of files: computed in blocks, and for readers once a process.

A checksum is written `crc32c:<8 hex digits>` (large files, 2 GB/s) or `sha256:<64 hex digits>` (all others).
"""

import hashlib
from typing import Any, Protocol

import google_crc32c
import numpy as np

from mi_pipe.core.place import LocalPlace, Place

_BLOCK_BYTES = 1 << 22
_whole: set[tuple[object, ...]] = set()


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


def _hasher(algorithm: str) -> _Hasher:
    return _Crc32c() if algorithm == "crc32c" else hashlib.sha256()


def matches(place: Place, name: str, checksum: str) -> bool:
    """Say whether a file exists and has the checksum; reads all of it."""
    algorithm, _, value = checksum.partition(":")
    hasher = _hasher(algorithm)
    try:
        with place.open(name) as file:
            block = np.empty(min(_BLOCK_BYTES, max(1, file.size)), np.uint8)
            for start in range(0, file.size, len(block)):
                hasher.update(block[: file.read_into([block.data], start)])
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return False
    return hasher.hexdigest() == value


def data_matches(data: bytes | np.ndarray, checksum: str) -> bool:
    """Say whether bytes in memory have the checksum."""
    algorithm, _, value = checksum.partition(":")
    hasher = _hasher(algorithm)
    hasher.update(np.frombuffer(data, np.uint8))
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


def _identity(place: Place, name: str, checksum: str) -> tuple[object, ...] | None:
    if not isinstance(place, LocalPlace):
        return place.url, name, checksum
    try:
        stat = (place.root / name).stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return str(place.root), name, checksum, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns
