"""Reads pools: whole blocks from anywhere in the store into memory allocated once, ahead of use, by several threads.

Two pools take turns: while rows leave one, the threads fill the other. Blocks are whole chunks, read straight into
their place; the threads wait for the disk or copy from its cache, both without holding Python's lock.
"""

from collections.abc import Generator, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int, Shaped

from mi_pipe.activations.row_array import RowArray
from mi_pipe.activations.storage_dtype import numpy_dtype
from mi_pipe.activations.training.shuffle_order import Segment, ShuffleOrder

Rows = dict[str, Shaped[np.ndarray, "row width"]]

_N_POOLS = 2
_SPARE_BLOCKS = 4
"""Pools differ a little in their numbers of blocks; with this much to spare none needs new memory, as a rule."""


@dataclass(frozen=True)
class Pool:
    """A pool in memory: its rows as they are stored, and which of them leave it, in order."""

    rows: Rows
    leaving: Int[np.ndarray, " row"]


@dataclass(frozen=True)
class _Filling:
    """A pool that is being read."""

    rows: Rows
    blocks: list[Future[None]]
    leaving: "Future[Int[np.ndarray, ' row']]"

    def result(self) -> Pool:
        """Wait until it is full; raises what reading raised."""
        for block in self.blocks:
            block.result()
        return Pool(self.rows, self.leaving.result())


class PoolReader:
    """Fills pools with the blocks of segments, all hook points alike."""

    def __init__(self, arrays: Mapping[str, RowArray], order: ShuffleOrder, n_threads: int) -> None:
        """Read `arrays` by hook point, in `order`, with `n_threads` threads."""
        self._arrays = dict(arrays)
        self._order = order
        self._n_threads = n_threads

    def pools(self, segments: Iterable[Segment]) -> Generator[Pool]:
        """Yield each segment's pool in turn; a pool is overwritten as soon as the next one is asked for."""
        memory: list[Rows] = [{} for _ in range(_N_POOLS)]
        executor = ThreadPoolExecutor(self._n_threads, thread_name_prefix="pool-filler")
        try:
            waiting: _Filling | None = None
            for turn, segment in enumerate(segments):
                filling = self._fill(executor, segment, memory[turn % _N_POOLS])
                if waiting is not None:
                    yield waiting.result()
                waiting = filling
            if waiting is not None:
                yield waiting.result()
        finally:
            executor.shutdown(wait=True, cancel_futures=True)

    def _fill(self, executor: ThreadPoolExecutor, segment: Segment, memory: Rows) -> _Filling:
        """Begin to read a segment's pool into `memory`."""
        places = segment.places.tolist()
        blocks: list[Future[Any]] = []
        for hook, array in self._arrays.items():
            rows = self._room(memory, hook, segment)
            for start, low, high in zip(segment.block_starts.tolist(), places[:-1], places[1:], strict=True):
                blocks.append(executor.submit(array.read_into, rows[low:high], start))
        return _Filling(dict(memory), blocks, executor.submit(self._order.leaving, segment))

    def _room(self, memory: Rows, hook: str, segment: Segment) -> Shaped[np.ndarray, "row width"]:
        if len(memory.get(hook, ())) < segment.n_rows:
            layout = self._arrays[hook].layout
            n_rows = segment.n_rows + _SPARE_BLOCKS * layout.chunk_rows
            memory[hook] = np.empty((n_rows, layout.width), numpy_dtype(layout.store_dtype))
        return memory[hook]
