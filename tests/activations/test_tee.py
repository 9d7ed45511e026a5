"""Every consumer sees every item, once and in order, whoever is faster."""

import itertools
import threading
import time

import pytest

from mi_pipe.activations.training.tee import tee


def counting(n, made):
    for i in range(n):
        made.append(i)
        yield i


def test_consumers_in_turn_see_every_item_made_once():
    made = []
    first, second, third = tee(counting(10, made), 3)
    assert list(zip(first, second, third, strict=True)) == [(i, i, i) for i in range(10)]
    assert made == list(range(10))


def test_threads_at_different_speeds_see_every_item():
    made, seen = [], {}

    def consume(number, stream):
        seen[number] = []
        for item in stream:
            time.sleep(0.002 * number)
            seen[number].append(item)

    threads = [
        threading.Thread(target=consume, args=item, daemon=True) for item in enumerate(tee(counting(40, made), 3, 2))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert seen == {number: list(range(40)) for number in range(3)}
    assert made == list(range(40))


def test_nobody_runs_far_ahead():
    made = []
    first, second = tee(counting(100, made), 2, max_lead=3)
    assert next(second) == 0
    assert list(itertools.islice(first, 3)) == [0, 1, 2]
    assert len(made) <= 4


def test_a_consumer_that_would_wait_for_its_own_thread_says_so():
    first, second = tee(counting(100, []), 2, max_lead=3)
    next(second)
    with pytest.raises(RuntimeError, match="in turn"):
        list(first)


def test_a_consumer_that_nobody_reads_is_named():
    first, _second = tee(counting(100, []), 2, max_lead=3, patience_s=0.1)
    with pytest.raises(RuntimeError, match="Nobody reads consumer 1"):
        list(first)


def test_who_leaves_is_not_waited_for_and_the_last_closes_the_source():
    closed = []

    def source():
        try:
            yield from range(100)
        finally:
            closed.append(True)

    first, second = tee(source(), 2)
    assert (next(first), next(second)) == (0, 0)
    second.close()
    assert list(itertools.islice(first, 50)) == list(range(1, 51))
    assert not closed
    first.close()
    assert closed


def test_an_error_reaches_everyone_after_the_items_before_it():
    def source():
        yield 1
        raise OSError("gone")

    for stream in tee(source(), 2):
        assert next(stream) == 1
    first, second = tee(source(), 2)
    for stream in (first, second):
        assert next(stream) == 1
        with pytest.raises(OSError, match="gone"):
            next(stream)
