"""The order of shuffled training rows: which blocks fill which pool, and in which order a pool's rows leave it.

1. The rows are cut into blocks of `block_rows`. An epoch takes the blocks in a seeded order and cuts that order into
   pools of about `pool_rows` training rows each.
2. A pool's training rows are permuted; the epoch's stream is the pools after one another; batch s of the epoch is rows
   [s batch_rows, (s + 1) batch_rows) of the stream. The last partial batch of an epoch is left out.

Everything is computed from (training rows, sizes, seed, epoch, pool), so any step can be the first. Rows of one prompt
that meet in a batch: batch_rows (n - 1) / pool_rows for prompts of n tokens; only the pool's size matters.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Int

_BLOCK_STREAM, _ROW_STREAM = 1, 2


@dataclass(frozen=True)
class Segment:
    """Rows `start` to `stop` of what leaves one pool; the pool is filled with blocks, one after the other."""

    epoch: int
    pool: int
    block_starts: Int[np.ndarray, " block"]
    """First row of each block in the store."""
    block_stops: Int[np.ndarray, " block"]
    start: int
    stop: int

    @cached_property
    def places(self) -> Int[np.ndarray, " block_edge"]:
        """Where each block begins in the pool's memory, and where the last one ends."""
        return np.concatenate([[0], np.cumsum(self.block_stops - self.block_starts)])

    @property
    def n_rows(self) -> int:
        """Rows of the pool's blocks, for training or not."""
        return int(self.places[-1])


@dataclass(frozen=True)
class _Epoch:
    """The blocks of an epoch in order: pool k has `blocks[edges[k]:edges[k + 1]]`, its rows begin at `starts[k]`."""

    blocks: Int[np.ndarray, " block"]
    edges: Int[np.ndarray, " pool_edge"]
    starts: Int[np.ndarray, " pool_edge"]


class ShuffleOrder:
    """The endless stream of training rows."""

    def __init__(
        self, is_training: Bool[np.ndarray, " row"], block_rows: int, batch_rows: int, pool_rows: int, seed: int
    ) -> None:
        """Order the rows that `is_training` marks; there is at least one."""
        self.batch_rows = batch_rows
        self.n_rows = int(is_training.sum())
        self._is_training = is_training
        self._block_rows = block_rows
        self._seed = seed
        self._n_pools = max(1, -(-self.n_rows // max(1, pool_rows)))
        edges = np.arange(0, len(is_training), block_rows)
        self._block_counts = np.add.reduceat(is_training, edges, dtype=np.int64)

    @property
    def n_steps_per_epoch(self) -> int:
        """Whole batches in one pass over the training rows."""
        return self.n_rows // self.batch_rows

    def segments(self, first_step: int, last_step: int) -> Iterator[Segment]:
        """Yield the parts of pools that the rows of steps `first_step` to `last_step` (exclusive) lie in, in order."""
        n_steps = self.n_steps_per_epoch
        for number in range(first_step // n_steps, -(-last_step // n_steps)):
            epoch = self._epoch(number)
            first = max(first_step - number * n_steps, 0) * self.batch_rows
            last = min(last_step - number * n_steps, n_steps) * self.batch_rows
            for pool, (low, high) in enumerate(zip(epoch.starts[:-1], epoch.starts[1:], strict=True)):
                start, stop = max(first, int(low)), min(last, int(high))
                if start < stop:
                    yield self._segment(epoch, number, pool, start - int(low), stop - int(low))

    def leaving(self, segment: Segment) -> Int[np.ndarray, " row"]:
        """Return the places in the pool's memory of the segment's rows, in the order in which they leave it."""
        blocks = zip(segment.block_starts, segment.block_stops, strict=True)
        flags = np.concatenate([self._is_training[start:stop] for start, stop in blocks])
        order = self._random(_ROW_STREAM, segment.epoch, segment.pool).permutation(np.flatnonzero(flags))
        return order[segment.start : segment.stop]

    def _segment(self, epoch: _Epoch, number: int, pool: int, start: int, stop: int) -> Segment:
        starts = epoch.blocks[epoch.edges[pool] : epoch.edges[pool + 1]] * self._block_rows
        stops = np.minimum(starts + self._block_rows, len(self._is_training))
        return Segment(number, pool, starts, stops, start, stop)

    def _epoch(self, number: int) -> _Epoch:
        """Order the blocks and cut the order into pools of about equal numbers of training rows."""
        blocks = self._random(_BLOCK_STREAM, number).permutation(len(self._block_counts))
        ends = np.cumsum(self._block_counts[blocks])
        begins = ends - self._block_counts[blocks]
        pool_of_block = begins * self._n_pools // self.n_rows
        edges = np.searchsorted(pool_of_block, np.arange(self._n_pools + 1))
        return _Epoch(blocks, edges, np.concatenate([begins, ends[-1:]])[edges])

    def _random(self, *stream: int) -> np.random.Generator:
        """Return the generator of one stream: the same whenever and wherever it is asked for."""
        return np.random.Generator(np.random.Philox(np.random.SeedSequence([self._seed, *stream])))
