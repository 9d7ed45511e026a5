"""The harvest's loop: shards in order, each filled from the batches that have rows in it."""

from collections.abc import Callable, Container

import numpy as np
from jaxtyping import Int, Shaped

from mi_pipe.activations.forward import ForwardPass
from mi_pipe.activations.plan import HarvestPlan
from mi_pipe.activations.writer import Buffers, ShardWriter

BatchRows = tuple[Int[np.ndarray, " row"], dict[str, Shaped[np.ndarray, "row width"]]]


def harvest_shards(
    plan: HarvestPlan,
    forward: ForwardPass,
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
    for shard in range(plan.layout.n_shards):
        start, stop = plan.layout.bounds(shard)
        if shard in done:
            n_rows += stop - start
            continue
        buffers = writer.buffers()
        for number in plan.batches_of(shard):
            if number not in carried:
                batch = plan.batch(number)
                carried[number] = (batch.rows, forward.rows(batch))
                n_run += 1
            n_rows += _fill(buffers, carried[number], start, stop)
            if plan.last_shard(number) == shard:
                del carried[number]
            on_rows(n_rows)
        writer.submit(shard, buffers)
        carried = {number: rows for number, rows in carried.items() if _is_next_needed(plan, number, shard, done)}
    return n_run


def _fill(buffers: Buffers, batch: BatchRows, start: int, stop: int) -> int:
    """Put a batch's rows of one shard into its buffers; return how many."""
    rows, values = batch
    first, last = np.searchsorted(rows, [start, stop])
    for name, buffer in buffers.items():
        buffer.put(rows[first:last] - start, values[name][first:last])
    return int(last - first)


def _is_next_needed(plan: HarvestPlan, number: int, shard: int, done: Container[int]) -> bool:
    return any(later not in done for later in range(shard + 1, plan.last_shard(number) + 1))
