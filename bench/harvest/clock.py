"""Wall and CPU seconds of a piece of work, as tokens a second."""

import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Speed:
    """Tokens a second of wall time, and a second of CPU time (of all threads of the process)."""

    wall: float
    cpu: float


def timed(n_tokens: int, work: Callable[[], object]) -> Speed:
    """Measure one piece of work on `n_tokens` tokens."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return Speed(n_tokens / (time.perf_counter() - wall), n_tokens / (time.process_time() - cpu))
