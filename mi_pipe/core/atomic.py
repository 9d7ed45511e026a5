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


@contextlib.contextmanager
def atomic_path(path: Path) -> Generator[Path]:
    """Yield a temporary path; when the block ends without error its file is moved to `path` durably."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temp = path.with_name(f".{path.name}.{uuid.uuid4().hex}{TEMP_SUFFIX}")
    try:
        yield temp
        with temp.open("rb") as file:
            os.fsync(file.fileno())
        temp.replace(path)
    finally:
        temp.unlink(missing_ok=True)
    fsync_folder(path.parent)


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path` atomically and durably."""
    with atomic_path(path) as temp:
        temp.write_bytes(data)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as readable, key-sorted JSON, atomically and durably."""
    text = json.dumps(value, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False)
    write_bytes(path, (text + "\n").encode())


def sweep_temporary(folder: Path) -> None:
    """Remove temporary files that killed writers left in `folder`; call only under the artifact's lock."""
    for leftover in folder.rglob(f".*{TEMP_SUFFIX}"):
        leftover.unlink(missing_ok=True)
