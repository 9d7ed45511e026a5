"""Where an export goes: a new file or folder that is there whole or not at all.

Everything is written in a temporary folder beside the target, made durable, and renamed onto it. What exists is never
replaced. A killed export leaves its folder `.<name>.<hex>.tmp`; the next export to the same target removes it. Who
writes holds a lock (flock) on his folder, which dies with his process, so nobody's work is taken for a leftover.
"""

import contextlib
import errno
import fcntl
import os
import re
import shutil
import uuid
from collections.abc import Generator
from pathlib import Path

from mi_pipe.core.artifact import format_size
from mi_pipe.core.atomic import TEMP_SUFFIX, fsync_folder
from mi_pipe.core.errors import ConfigError, DiskSpaceError
from mi_pipe.core.stage import free_bytes

_DISK_MARGIN = 1.02
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def new_target(path: Path, size_bytes: int) -> Generator[Path]:
    """Yield a temporary path for a file or folder of about `size_bytes`; when the block ends well it becomes `path`.

    Raises ConfigError if there is something at `path` already or no folder to put it into, DiskSpaceError if the disk
    is too small before or while writing.
    """
    path = path.absolute()
    _check_place(path)
    _sweep(path)
    _check_free(path, size_bytes)
    try:
        with _own_folder(path) as folder:
            temp = folder / path.name
            yield temp
            _make_durable(temp)
            if path.exists():
                raise ConfigError(_exists(path))
            temp.rename(path)
            fsync_folder(path.parent)
    except OSError as error:
        if error.errno in _FULL:
            raise DiskSpaceError(_too_small(path, size_bytes)) from error
        raise


@contextlib.contextmanager
def _own_folder(path: Path) -> Generator[Path]:
    """Yield a new folder beside `path`, locked, and remove it in the end."""
    folder, lock = _claim(path)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _claim(path: Path) -> tuple[Path, int]:
    """Make a temporary folder and lock it; one that was swept before the lock was had is made anew."""
    while True:
        folder = path.with_name(f".{path.name}.{uuid.uuid4().hex}{TEMP_SUFFIX}")
        folder.mkdir()
        with contextlib.suppress(FileNotFoundError):
            lock = os.open(folder, os.O_RDONLY)
            fcntl.flock(lock, fcntl.LOCK_EX)
            if folder.exists():
                return folder, lock
            os.close(lock)


def _sweep(path: Path) -> None:
    """Remove what killed exports to `path` left."""
    leftover = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{32}}{re.escape(TEMP_SUFFIX)}")
    for found in [item for item in path.parent.iterdir() if leftover.fullmatch(item.name)]:
        # Somebody works in it, it is gone by now, or it is another user's: then it stays.
        with contextlib.suppress(OSError):
            lock = os.open(found, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(found)
            finally:
                os.close(lock)


def _check_place(path: Path) -> None:
    if path.exists() or path.is_symlink():
        raise ConfigError(_exists(path))
    if not path.parent.is_dir():
        raise ConfigError(f"There is no folder {path.parent} to put {path.name} into.")


def _check_free(path: Path, size_bytes: int) -> None:
    if free_bytes(path.parent) < size_bytes * _DISK_MARGIN:
        raise DiskSpaceError(_too_small(path, size_bytes))


def _exists(path: Path) -> str:
    return f"{path} exists already, and an export replaces nothing. Remove it or choose another --out."


def _too_small(path: Path, size_bytes: int) -> str:
    return (
        f"{path} takes {format_size(size_bytes)} and {format_size(free_bytes(path.parent))} are free there. "
        "Free space, choose another disk, or export fewer hook points with --hook."
    )


def _make_durable(temp: Path) -> None:
    for path in [*temp.rglob("*"), temp]:
        if path.is_dir():
            fsync_folder(path)
        else:
            with path.open("rb") as file:
                os.fsync(file.fileno())
