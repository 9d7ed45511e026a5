"""The harvest's loop: shards in order, each filled from the batches that have rows in it.

On a GPU the next batch is started before the rows of the last are waited for, so that the device computes while the
host copies.
"""

from collections import deque
from collections.abc import Callable, Container, Iterator

import numpy as np
from jaxtyping import Int, Shaped

from mi_pipe.activations.harvest.collecting import PendingRows
from mi_pipe.activations.harvest.forward import RowSource
from mi_pipe.activations.harvest.plan import HarvestPlan
from mi_pipe.activations.harvest.writer import Buffers, ShardWriter

BatchRows = tuple[Int[np.ndarray, " row"], dict[str, Shaped[np.ndarray, "row width"]]]


def harvest_shards(
    plan: HarvestPlan,
    source: RowSource,
    writer: ShardWriter,
    done: Container[int],
    on_rows: Callable[[int], None],
) -> int:
    """Fill and hand over every shard that is not done; return the number of batches run.

    `on_rows(n)` is called with the number of rows filled in so far, those of finished shards included. A batch
    with rows in several shards is kept until its last shard is filled.
    """
    carried: dict[int, BatchRows] = {}
    n_rows, n_run = 0, 0
    results = _results(plan, source, _run_order(plan, done))
    for shard in range(plan.layout.n_shards):
        start, stop = plan.layout.bounds(shard)
        if shard in done:
            n_rows += stop - start
            continue
        buffers = writer.buffers()
        for number in plan.batches_of(shard):
            if number not in carried:
                carried[number] = next(results)
                n_run += 1
            n_rows += _fill(buffers, carried[number], start, stop)
            if not _is_needed_after(plan, number, shard, done):
                del carried[number]
            on_rows(n_rows)
        writer.submit(shard, buffers)
    return n_run


def _run_order(plan: HarvestPlan, done: Container[int]) -> Iterator[int]:
    """Yield the batches in the order in which they are first needed, those again that are no longer carried."""
    carried: set[int] = set()
    for shard in range(plan.layout.n_shards):
        if shard in done:
            continue
        for number in plan.batches_of(shard):
            if number not in carried:
                yield number
            (carried.add if _is_needed_after(plan, number, shard, done) else carried.discard)(number)


def _results(plan: HarvestPlan, source: RowSource, numbers: Iterator[int]) -> Iterator[BatchRows]:
    """Run batches, `source.n_ahead` of them started before the rows of one are waited for."""
    started: deque[tuple[Int[np.ndarray, " row"], PendingRows]] = deque()
    for number in numbers:
        batch = plan.batch(number)
        started.append((batch.rows, source.start(batch)))
        if len(started) > source.n_ahead:
            rows, pending = started.popleft()
            yield rows, pending.result()
    for rows, pending in started:
        yield rows, pending.result()


def _fill(buffers: Buffers, batch: BatchRows, start: int, stop: int) -> int:
    """Put a batch's rows of one shard into its buffers; return how many."""
    rows, values = batch
    first, last = np.searchsorted(rows, [start, stop])
    for name, buffer in buffers.items():
        buffer.put(rows[first:last] - start, values[name][first:last])
    return int(last - first)


def _is_needed_after(plan: HarvestPlan, number: int, shard: int, done: Container[int]) -> bool:
    return any(later not in done for later in range(shard + 1, plan.last_shard(number) + 1))
