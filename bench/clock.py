"""Seconds of a turn, and how much of the machine other programs used meanwhile."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

_STAT = Path("/proc/stat")
_N_FIELDS = 8
_IDLE, _WAITING = 3, 4
QUIET_CORES = 0.15
"""A turn during which others used more of a core than this tells little."""


@dataclass(frozen=True)
class Turn:
    """Seconds of wall and CPU time (of all threads of the process that worked), and cores that others used."""

    wall: float
    cpu: float
    foreign_cores: float | None
    """None where the system does not tell."""

    @property
    def is_quiet(self) -> bool:
        """Say whether the turn is worth quoting."""
        return self.foreign_cores is None or self.foreign_cores < QUIET_CORES


def timed(work: Callable[[], tuple[float, float] | None]) -> Turn:
    """Measure a turn; work that is done in another process returns its own wall and CPU seconds."""
    busy, wall, cpu = _busy_seconds(), time.perf_counter(), time.process_time()
    found = work()
    elapsed = time.perf_counter() - wall
    own = found or (elapsed, time.process_time() - cpu)
    if busy is None:
        return Turn(*own, None)
    foreign = ((_busy_seconds() or busy) - busy - own[1]) / elapsed
    return Turn(*own, round(max(0.0, foreign), 3))


def _busy_seconds() -> float | None:
    """Return the seconds that all cores together have worked since the machine started."""
    if not _STAT.exists():
        return None
    ticks = [int(field) for field in _STAT.read_text().split("\n", 1)[0].split()[1 : 1 + _N_FIELDS]]
    return (sum(ticks) - ticks[_IDLE] - ticks[_WAITING]) / os.sysconf("SC_CLK_TCK")
