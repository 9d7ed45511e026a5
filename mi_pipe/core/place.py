"""Where files lie: a folder of this machine or a prefix of an object store, behind the few calls a store needs.

A key is a relative path with slashes. Writes are whole and atomic in both: a temporary name, fsync and rename in a
folder, one PUT in an object store. `create` writes only where nothing is yet, which decides between two writers.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol, TypeAlias

from mi_pipe.core import atomic

Bytes: TypeAlias = bytes | bytearray | memoryview
_FILE_SCHEME = "file://"
_MOST_BUFFERS = 512
"""Buffers of one system call; Linux takes at most 1,024."""


class OpenFile(Protocol):
    """A file open for reading at any offset."""

    @property
    def size(self) -> int:
        """Size in bytes."""
        ...

    def read_into(self, buffers: Sequence[memoryview], offset: int) -> int:
        """Fill writable buffers, one after the other, with the bytes from `offset` on; return how many came."""
        ...

    def read_pieces(self, offsets: Sequence[int], n_bytes: int) -> list[bytes]:
        """Return `n_bytes` from each offset, fewer at the file's end."""
        ...


class Place(Protocol):
    """A folder or a prefix. `FileNotFoundError` where a key does not exist."""

    @property
    def url(self) -> str:
        """How users name the place: a path or a URL."""
        ...

    def within(self, folder: str) -> "Place":
        """Return the place of a folder within this one."""
        ...

    def open(self, key: str) -> AbstractContextManager[OpenFile]:
        """Open a file for reading."""
        ...

    def read(self, key: str) -> bytes:
        """Return the bytes of a file."""
        ...

    def size(self, key: str) -> int | None:
        """Return the size of a file in bytes, or None if there is none."""
        ...

    def write(self, key: str, data: Bytes) -> None:
        """Write a file whole, durably, in place of one that may be there."""
        ...

    def create(self, key: str, data: Bytes) -> bool:
        """Write a file whole, durably, unless one is there; say whether `data` is what lies there now.

        Of several writers with different data, at once, exactly the first is told yes.
        """
        ...

    def keys(self, folder: str = "") -> Iterator[str]:
        """Yield the keys of the files in a folder and below, in no order, unfinished temporary files left out."""
        ...

    def remove(self, key: str) -> None:
        """Remove a file if it is there."""
        ...


class LocalPlace:
    """A folder of this machine."""

    def __init__(self, root: str | os.PathLike[str]) -> None:
        """Use the folder `root`, which need not exist yet."""
        self.root = Path(root)

    @property
    def url(self) -> str:
        """The folder's path."""
        return str(self.root)

    def within(self, folder: str) -> "LocalPlace":
        """Return the place of a folder within this one."""
        return LocalPlace(self.root / folder)

    def open(self, key: str) -> "LocalFile":
        """Open a file for reading."""
        return LocalFile(self.root / key)

    def read(self, key: str) -> bytes:
        """Return the bytes of a file."""
        return (self.root / key).read_bytes()

    def size(self, key: str) -> int | None:
        """Return the size of a file in bytes, or None if there is none."""
        path = self.root / key
        return path.stat().st_size if path.is_file() else None

    def write(self, key: str, data: Bytes) -> None:
        """Write a file whole: temporary name, fsync, rename, fsync of the folder."""
        atomic.write_bytes(self.root / key, data)

    def create(self, key: str, data: Bytes) -> bool:
        """Write a file whole unless one is there; say whether `data` is what lies there now."""
        return atomic.create_bytes(self.root / key, data) or self.read(key) == bytes(data)

    def keys(self, folder: str = "") -> Iterator[str]:
        """Yield the keys of the files in a folder and below."""
        for path in (self.root / folder).rglob("*"):
            if path.is_file() and not path.name.endswith(atomic.TEMP_SUFFIX):
                yield path.relative_to(self.root).as_posix()

    def remove(self, key: str) -> None:
        """Remove a file if it is there."""
        (self.root / key).unlink(missing_ok=True)


class LocalFile:
    """A file of this machine, open for reading."""

    def __init__(self, path: Path) -> None:
        """Open `path`; raises FileNotFoundError."""
        self._handle = os.open(path, os.O_RDONLY)
        self.size = os.fstat(self._handle).st_size

    def __enter__(self) -> "LocalFile":
        """Return the open file."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        os.close(self._handle)

    def read_into(self, buffers: Sequence[memoryview], offset: int) -> int:
        """Fill buffers with the bytes from `offset` on; return how many came, fewer only at the file's end."""
        waiting = [buffer.cast("B") for buffer in buffers if buffer.nbytes]
        total = 0
        while waiting:
            n_read = os.preadv(self._handle, waiting[:_MOST_BUFFERS], offset + total)
            if n_read == 0:
                break
            total += n_read
            waiting = _after(waiting, n_read)
        return total

    def read_pieces(self, offsets: Sequence[int], n_bytes: int) -> list[bytes]:
        """Return `n_bytes` from each offset, fewer at the file's end."""
        return [os.pread(self._handle, n_bytes, offset) for offset in offsets]


def _after(buffers: list[memoryview], n_bytes: int) -> list[memoryview]:
    """Return what is left of buffers once the first `n_bytes` are filled."""
    for i, buffer in enumerate(buffers):
        if n_bytes < buffer.nbytes:
            return [buffer[n_bytes:], *buffers[i + 1 :]]
        n_bytes -= buffer.nbytes
    return []


def open_place(url: str | os.PathLike[str]) -> Place:
    """Return the place of a path or URL (`s3://bucket/prefix`, `gs://`, `az://`, `file:///…`).

    Raises ConfigError for a URL that no object store answers to.
    """
    text = os.fspath(url)
    if not is_url(text):
        return LocalPlace(Path(text).expanduser())
    if text.startswith(_FILE_SCHEME):
        return LocalPlace(text.removeprefix(_FILE_SCHEME))
    from mi_pipe.core.object_place import ObjectPlace

    return ObjectPlace(text)


def is_url(text: str) -> bool:
    """Say whether a text names a place by URL.

    >>> is_url("s3://bucket/runs"), is_url("data/store")
    (True, False)
    """
    return "://" in text
