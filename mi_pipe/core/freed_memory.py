"""Keeps freed memory in the process while a loop allocates the same large arrays over and over.

glibc gives large blocks back to the system when they are freed, and the system clears every page before it gives one
out again. A training step of an SAE allocates some 60 MB in arrays of 10 MB; clearing them took a ninth of its time.
Other C libraries are left as they are.
"""

import ctypes
import platform
from collections.abc import Generator
from contextlib import contextmanager

# Numbers of malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_NEVER = 1 << 30
_LARGEST_OLD_THRESHOLD = 1 << 25
"""Before version 2.35, glibc takes no larger threshold; it is also what glibc itself comes to in the end."""


@contextmanager
def freed_memory_kept() -> Generator[None]:
    """Keep freed memory for the next allocation; it goes back to the system at the end.

    The setting is the whole process's: where two threads train at once, the first to end ends it for both, which costs
    the other time but changes nothing else.
    """
    if platform.libc_ver()[0] != "glibc":
        yield
        return
    libc = ctypes.CDLL(None)
    if not libc.mallopt(_M_MMAP_THRESHOLD, _NEVER):
        libc.mallopt(_M_MMAP_THRESHOLD, _LARGEST_OLD_THRESHOLD)
    libc.mallopt(_M_TRIM_THRESHOLD, _NEVER)
    try:
        yield
    finally:
        libc.mallopt(_M_MMAP_THRESHOLD, _LARGEST_OLD_THRESHOLD)
        libc.mallopt(_M_TRIM_THRESHOLD, 2 * _LARGEST_OLD_THRESHOLD)
        libc.malloc_trim(0)
