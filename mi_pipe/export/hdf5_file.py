"""A new HDF5 file whose disk may fill up.

HDF5 cannot close a file that it failed to write, and the process crashes later (h5py 3.16, HDF5 1.14: a segmentation
fault when the objects are collected). So HDF5 writes into an object that never fails: the first error of the disk is
kept, everything after it is dropped, the file is closed, and then the error is raised.
"""

import contextlib
import io
import os
from collections.abc import Callable, Generator
from pathlib import Path

import h5py


@contextlib.contextmanager
def new_hdf5(path: Path) -> Generator[tuple[h5py.File, Callable[[], None]]]:
    """Yield a new HDF5 file, and a function that raises the disk's OSError if there was one; call it now and then."""
    with _KeepsErrors(path) as disk:
        try:
            with h5py.File(disk, "w") as file:
                yield file, disk.check
        finally:
            disk.check()


class _KeepsErrors(io.FileIO):
    """A file that takes every write, as HDF5's driver for file objects calls it."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "w+b")
        self._error: OSError | None = None

    def write(self, data: memoryview, /) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        rest = memoryview(data).cast("B")
        size = len(rest)
        try:
            while len(rest) and self._error is None:
                rest = rest[super().write(rest) :]
        except OSError as error:
            self._error = error
        return size

    def truncate(self, size: int | None = None, /) -> int:
        try:
            return super().truncate(size)
        except OSError as error:
            self._error = self._error or error
            return size or 0

    def check(self) -> None:
        """Raise the first error of the disk, if there was one."""
        if self._error is not None:
            raise OSError(self._error.errno, os.strerror(self._error.errno or 0)) from self._error
