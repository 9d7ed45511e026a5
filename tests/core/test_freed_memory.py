import platform
import subprocess
import sys

import pytest

SCRIPT = """
import contextlib, resource
from pathlib import Path
import torch
from mi_pipe.core.freed_memory import freed_memory_kept

def step():
    # Sizes that differ, so that glibc's own adaptation does not help.
    arrays = [torch.ones(size << 18) for size in (9, 10, 11, 40)]
    return sum(float(array[0]) for array in arrays)

def faults():
    torch.set_num_threads(1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident_mb():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() // (1 << 20)

plain = faults()
with freed_memory_kept():
    faults()  # holes between what lives longer take some steps to settle
    kept, held = faults(), resident_mb()
print(plain, kept, held - resident_mb())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_memory_is_used_again_and_goes_back_at_the_end():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    plain, kept, given_back_mb = map(int, done.stdout.split())
    assert plain > 4 * 10_000, "each step's 70 MB are new pages of 4 KB"
    assert kept < plain / 10
    assert given_back_mb > 50


def test_other_libraries_are_left_alone(monkeypatch):
    from mi_pipe.core import freed_memory

    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(freed_memory.ctypes, "CDLL", lambda _: pytest.fail("called"))
    with freed_memory.freed_memory_kept():
        pass
