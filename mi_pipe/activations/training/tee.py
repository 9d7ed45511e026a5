"""One stream for several consumers, each of which sees every item.

Consumers may be threads, or take turns in one thread. Who is ahead waits for the others once it leads by `max_lead`
items; a consumer that is closed is no longer waited for.
"""

import threading
from collections import deque
from collections.abc import Generator
from typing import Generic, TypeVar

ItemT = TypeVar("ItemT")

_MAX_LEAD = 4
_PATIENCE_S = 60.0
"""How long a consumer that nobody has begun to read is waited for."""


def tee(
    items: Generator[ItemT], n_consumers: int, max_lead: int = _MAX_LEAD, patience_s: float = _PATIENCE_S
) -> list[Generator[ItemT]]:
    """Return `n_consumers` generators of the same items, which are made once.

    What making an item raises, every consumer raises. Raises RuntimeError where a consumer would wait for ever: for
    one that runs in the same thread, or that nobody reads.
    """
    stream = _Stream(items, n_consumers, max_lead, patience_s)
    return [stream.consumer(i) for i in range(n_consumers)]


class _Stream(Generic[ItemT]):
    """Items that not all consumers have taken yet."""

    def __init__(self, items: Generator[ItemT], n_consumers: int, max_lead: int, patience_s: float) -> None:
        self._items = items
        self._max_lead = max_lead
        self._patience_s = patience_s
        self._changed = threading.Condition()
        self._waiting: dict[int, deque[ItemT]] = {i: deque() for i in range(n_consumers)}
        self._threads: dict[int, int] = {}
        self._is_at_end = False
        self._error: Exception | None = None

    def consumer(self, number: int) -> Generator[ItemT]:
        """Yield every item to one consumer."""
        own = self._waiting[number]
        try:
            while self._has_next(number, own):
                yield own.popleft()
        finally:
            self._leave(number)

    def _has_next(self, number: int, own: "deque[ItemT]") -> bool:
        """Wait until a consumer has an item; False at the end."""
        with self._changed:
            self._threads[number] = threading.get_ident()
            self._changed.notify_all()
            while not own and not self._is_at_end:
                slowest = max(self._waiting, key=lambda i: len(self._waiting[i]))
                if len(self._waiting[slowest]) < self._max_lead:
                    self._make()
                else:
                    self._wait_for(slowest)
            if not own and self._error is not None:
                raise self._error
            return bool(own)

    def _make(self) -> None:
        try:
            item = next(self._items)
        except StopIteration:
            self._is_at_end = True
        except Exception as error:
            self._is_at_end, self._error = True, error
        else:
            for waiting in self._waiting.values():
                waiting.append(item)
        self._changed.notify_all()

    def _wait_for(self, slowest: int) -> None:
        thread = self._threads.get(slowest)
        if thread == threading.get_ident():
            raise RuntimeError(
                f"Consumer {slowest} is {self._max_lead} items behind in the same thread: take items in turn."
            )
        in_time = self._changed.wait(None if thread is not None else self._patience_s)
        if not in_time and slowest not in self._threads:
            raise RuntimeError(f"Nobody reads consumer {slowest}, for which the others wait: read it, or close it.")

    def _leave(self, number: int) -> None:
        with self._changed:
            self._waiting.pop(number).clear()
            if not self._waiting:
                self._items.close()
            self._changed.notify_all()
