"""Whole-file writes: a reader sees the old file or the new one, never a part, also after power loss.

Steps: write to a temporary name in the same folder, fsync, rename onto the final name, fsync the folder.
"""

import contextlib
import json
import os
import uuid
from collections.abc import Generator
from pathlib import Path
from typing import Any

TEMP_SUFFIX = ".tmp"


def fsync_folder(folder: Path) -> None:
    """Make renames inside `folder` durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, durably: a file in it would be lost with its folder's name."""
    missing = [item for item in (folder, *folder.parents) if not item.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for made in reversed(missing):
        fsync_folder(made.parent)


@contextlib.contextmanager
def atomic_path(path: Path) -> Generator[Path]:
    """Yield a temporary path; when the block ends without error its file is moved to `path` durably."""
    make_folder(path.parent)
    temp = _temporary(path)
    try:
        yield temp
        with temp.open("rb") as file:
            os.fsync(file.fileno())
        temp.replace(path)
    finally:
        temp.unlink(missing_ok=True)
    fsync_folder(path.parent)


def write_bytes(path: Path, data: bytes | bytearray | memoryview) -> None:
    """Write `data` to `path` atomically and durably."""
    with atomic_path(path) as temp:
        temp.write_bytes(data)


def create_bytes(path: Path, data: bytes | bytearray | memoryview) -> bool:
    """Write `data` to `path` unless a file is there, atomically and durably; say whether it was written.

    A hard link, unlike a rename, never replaces: of several writers at once one is told that it was first.
    """
    make_folder(path.parent)
    temp = _temporary(path)
    try:
        with temp.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.link(temp, path)
    except FileExistsError:
        return False
    finally:
        temp.unlink(missing_ok=True)
    fsync_folder(path.parent)
    return True


def write_json(path: Path, value: Any) -> None:
    """Write `value` as readable, key-sorted JSON, atomically and durably."""
    write_bytes(path, json_bytes(value))


def json_bytes(value: Any) -> bytes:
    """Return `value` as readable, key-sorted JSON."""
    return (json.dumps(value, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}{TEMP_SUFFIX}")


def sweep_temporary(folder: Path) -> None:
    """Remove temporary files that killed writers left in `folder`; call only under the artifact's lock."""
    for leftover in folder.rglob(f".*{TEMP_SUFFIX}"):
        leftover.unlink(missing_ok=True)
