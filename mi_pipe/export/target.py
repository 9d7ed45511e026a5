"""Where an export goes: a new file or folder that is there whole or not at all.

Everything is written below a temporary name beside the target, made durable, and renamed onto it. What exists is never
replaced. A killed export leaves at most `.<name>.<hex>.tmp`, which may be removed.
"""

import contextlib
import errno
import os
import shutil
import uuid
from collections.abc import Generator
from pathlib import Path

from mi_pipe.core.artifact import format_size
from mi_pipe.core.atomic import TEMP_SUFFIX, fsync_folder
from mi_pipe.core.errors import ConfigError, DiskSpaceError

_DISK_MARGIN = 1.02
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def new_target(path: Path, size_bytes: int) -> Generator[Path]:
    """Yield a temporary path for a file or folder of about `size_bytes`; when the block ends well it becomes `path`.

    Raises ConfigError if there is something at `path` already or no folder to put it into, DiskSpaceError if the disk
    is too small before or while writing.
    """
    path = path.absolute()
    _check_free(path, size_bytes)
    temp = path.with_name(f".{path.name}.{uuid.uuid4().hex}{TEMP_SUFFIX}")
    try:
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
    finally:
        if temp.is_dir():
            shutil.rmtree(temp, ignore_errors=True)
        temp.unlink(missing_ok=True)


def _check_free(path: Path, size_bytes: int) -> None:
    if path.exists() or path.is_symlink():
        raise ConfigError(_exists(path))
    if not path.parent.is_dir():
        raise ConfigError(f"There is no folder {path.parent} to put {path.name} into.")
    if shutil.disk_usage(path.parent).free < size_bytes * _DISK_MARGIN:
        raise DiskSpaceError(_too_small(path, size_bytes))


def _exists(path: Path) -> str:
    return f"{path} exists already, and an export replaces nothing. Remove it or choose another --out."


def _too_small(path: Path, size_bytes: int) -> str:
    free = format_size(shutil.disk_usage(path.parent).free)
    return (
        f"{path} takes {format_size(size_bytes)} and {free} are free there. "
        "Free space, choose another disk, or export fewer hook points with --hook."
    )


def _make_durable(temp: Path) -> None:
    for path in [*temp.rglob("*"), temp]:
        if path.is_dir():
            fsync_folder(path)
        else:
            with path.open("rb") as file:
                os.fsync(file.fileno())
