"""Interruptions that wait: work that is in the middle of a step finishes it, and saves itself, before it is ended.

SIGINT and SIGTERM are held back while a `Held` is open in the main thread (elsewhere Python delivers no signals, and
`asked` stays False). Whoever works looks at `asked` where it can stop; when the block ends, what was held back is
delivered to the handlers of before.
"""

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Held:
    """Holds interruptions back; a second one of the same kind is not held back any more."""

    def __init__(self) -> None:
        """Hold nothing back yet."""
        self._before: dict[int, Any] = {}
        self._caught: list[int] = []
        self.was_asked = False
        """Whether somebody wanted the work to end, known also after the block."""

    @property
    def asked(self) -> bool:
        """Whether somebody wants the work to end."""
        return bool(self._caught)

    def __enter__(self) -> "Held":
        """Begin to hold back."""
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._catch) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Bring the handlers of before back, and deliver what was held back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
        caught, self._caught = self._caught, []
        for number in caught[:1]:
            os.kill(os.getpid(), number)

    def _catch(self, number: int, frame: FrameType | None) -> None:
        del frame
        if number in self._caught:
            signal.signal(number, self._before[number])
        self._caught.append(number)
        self.was_asked = True
