"""Runs a generator ahead of its consumer, in a thread of its own."""

import queue
import threading
from collections.abc import Generator
from typing import TypeVar, cast

ItemT = TypeVar("ItemT")

_END = object()
_POLL_S = 0.1


def in_background(items: Generator[ItemT], n_ready: int, name: str) -> Generator[ItemT]:
    """Yield what a generator yields, up to `n_ready` items made ahead of use; raise what it raises.

    The thread `name` begins with the first item asked for and ends when the consumer stops asking.
    """
    ready: queue.Queue[object] = queue.Queue(n_ready)
    stopped = threading.Event()
    thread = threading.Thread(target=_produce, args=(items, ready, stopped), name=name, daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not _END:
            if isinstance(item, Exception):
                raise item
            yield cast(ItemT, item)
            del item
    finally:
        stopped.set()
        thread.join()


def _produce(items: Generator[object], ready: "queue.Queue[object]", stopped: threading.Event) -> None:
    try:
        for item in items:
            if not _put(ready, item, stopped):
                return
            del item
        _put(ready, _END, stopped)
    except Exception as error:
        _put(ready, error, stopped)
    finally:
        items.close()


def _put(ready: "queue.Queue[object]", item: object, stopped: threading.Event) -> bool:
    """Put an item as soon as there is room, unless nobody waits for it any more; say whether it was put."""
    while not stopped.is_set():
        try:
            ready.put(item, timeout=_POLL_S)
        except queue.Full:
            continue
        return True
    return False
