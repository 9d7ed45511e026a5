"""Turns a full disk, a used-up quota or a file-size limit, met anywhere while writing, into one sentence.

The libraries that write for us raise it in their own ways: Python, pyarrow and zarr as OSError with the number of the
operating system, NumPy without it, safetensors as an error of its own that holds the words of the operating system.
"""

import contextlib
import errno
import shutil
from collections.abc import Generator, Iterator
from pathlib import Path

from mi_pipe.core.errors import DiskSpaceError

_NOTHING_LEFT = 1 << 16
"""Bytes free at which an OSError that does not say why is taken for a full disk."""
_REASONS = {
    errno.ENOSPC: "the disk of {root} is full ({free:.2f} GB free)",
    errno.EDQUOT: "the quota on the disk of {root} is used up",
    errno.EFBIG: "a file would be larger than this process or the disk of {root} allows (`ulimit -f`)",
}


@contextlib.contextmanager
def told_if_full(root: Path, name: str) -> Generator[None]:
    """Raise DiskSpaceError in place of an error in the block whose cause is that `root` takes no more bytes."""
    try:
        yield
    except Exception as error:
        free = shutil.disk_usage(root).free
        reason = _reason(error, free)
        if reason is None:
            raise
        what = reason.format(root=root, free=free / 1e9)
        raise DiskSpaceError(
            f"{name} stopped: {what}. What was finished stays; free space and give the same command again to go on."
        ) from error


def _reason(error: BaseException, free: int) -> str | None:
    """Return what was exhausted, if that is why an error was raised; `free` is in bytes."""
    for cause in _causes(error):
        number = cause.errno if isinstance(cause, OSError) else None
        if isinstance(cause, OSError) and number is None and free < _NOTHING_LEFT:
            return _REASONS[errno.ENOSPC]
        for code, reason in _REASONS.items():
            if number == code or f"(os error {code})" in str(cause):
                return reason
    return None


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        yield cause
        cause = cause.__cause__
