"""Progress as plain calls, so that a stage knows neither the terminal nor the scheduler that shows it."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Tick:
    """One report of progress: `done` of `total` units, with a short note such as "loss 1.23"."""

    done: float
    total: float
    unit: str
    note: str = ""


Listener = Callable[[Tick], None]


class Progress:
    """Passes reports to a listener at most every `every_s` seconds, and always the last one."""

    def __init__(self, listener: Listener | None = None, every_s: float = 0.2) -> None:
        """Report to `listener`, or to nobody."""
        self._listener = listener
        self._every_s = every_s
        self._last = float("-inf")
        self._lock = threading.Lock()

    def update(self, done: float, total: float, unit: str = "", note: str = "") -> None:
        """Say that `done` of `total` units are done."""
        if self._listener is None:
            return
        with self._lock:
            now = time.monotonic()
            if done < total and now - self._last < self._every_s:
                return
            self._last = now
        self._listener(Tick(done, total, unit, note))
