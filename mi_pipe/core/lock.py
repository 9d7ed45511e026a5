"""One writer an artifact: an advisory `flock` that dies with its process, so a kill never leaves it behind."""

import contextlib
import fcntl
import json
import os
import socket
import time
from collections.abc import Generator
from pathlib import Path

from mi_pipe.core.errors import ArtifactLockedError

_POLL_S = 0.5


@contextlib.contextmanager
def exclusive_lock(path: Path, artifact_id: str, wait: bool = False) -> Generator[None]:
    """Hold the lock file at `path` for the block.

    Raises ArtifactLockedError at once if another process holds it, or waits for it if `wait`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", encoding="utf-8") as file:
        while not _try_lock(file.fileno()):
            if not wait:
                raise ArtifactLockedError(
                    f"{artifact_id} is being written by {_holder(path)}. "
                    "Let that run finish, or run again with --wait to wait for it."
                )
            time.sleep(_POLL_S)
        file.seek(0)
        file.truncate()
        json.dump({"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%H:%M:%S")}, file)
        file.flush()
        yield


def is_locked(path: Path) -> bool:
    """Say whether some process holds the lock file at `path` now."""
    if not path.exists():
        return False
    with path.open("a+", encoding="utf-8") as file:
        return not _try_lock(file.fileno())


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _holder(path: Path) -> str:
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        return f"process {held['pid']} on {held['host']} since {held['since']}"
    except (OSError, ValueError, KeyError):
        return "another process"
