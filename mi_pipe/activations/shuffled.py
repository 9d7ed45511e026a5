"""Training batches in random order: random blocks from anywhere fill a pool, rows leave it shuffled.

1. The store is cut into blocks of whole chunks. An epoch takes the blocks in a seeded order and cuts that order into
   pools of about `pool_rows` training rows each (held-out prompts and massive rows are not among them).
2. A pool's rows are permuted; the epoch's stream is the pools after one another; batch s of the epoch is rows
   [s batch_rows, (s + 1) batch_rows) of the stream. The last partial batch of an epoch is left out.
3. Pool k + 1 is read while batches leave pool k; batches are gathered in a thread of their own.

All of it is computed from (store, seed, epoch, pool), so reading can begin at any step at the cost of one pool. Rows of
one prompt that meet in a batch: batch_rows (n - 1) / pool_rows for prompts of n tokens; only the pool's size matters.
"""

import queue
import threading
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from mi_pipe.activations.storage_dtype import StoreDType, decode, numpy_dtype
from mi_pipe.core.errors import ConfigError

if TYPE_CHECKING:
    from mi_pipe.activations.store import ActivationStore

_N_READY_BATCHES = 4
_N_POOL_BUFFERS = 2
_BLOCK_STREAM, _ROW_STREAM = 1, 2

Batch = dict[str, Float[Tensor, "batch width"]]
Rows = dict[str, Shaped[np.ndarray, "row width"]]


@dataclass(frozen=True)
class _Epoch:
    """The blocks of an epoch in order: pool k has `blocks[edges[k]:edges[k + 1]]`, its rows begin at `starts[k]`."""

    number: int
    blocks: Int[np.ndarray, " block"]
    edges: Int[np.ndarray, " pool_edge"]
    starts: Int[np.ndarray, " pool_edge"]


@dataclass(frozen=True)
class _Segment:
    """Rows `start` to `stop` of a pool's permuted training rows."""

    epoch: _Epoch
    pool: int
    start: int
    stop: int


@dataclass(frozen=True)
class _Loaded:
    """A segment in memory: the rows of its pool, and which of them leave it, in order."""

    rows: Rows
    order: Int[np.ndarray, " row"]


class ShuffledReader:
    """Endless shuffled training rows of one or several hook points, row-aligned; begins at any step."""

    def __init__(
        self,
        store: "ActivationStore",
        hooks: Sequence[str],
        batch_rows: int,
        seed: int = 0,
        pool_rows: int = 1 << 18,
        held_out_fraction: float = 0.05,
        split_seed: int = 0,
    ) -> None:
        """Read `hooks` in batches of `batch_rows`; raises ConfigError if an epoch has no whole batch."""
        self.hooks = list(hooks)
        self.batch_rows = batch_rows
        self._dtype: StoreDType = store.dtype
        self._seed = seed
        self._arrays = {hook: store.array(hook) for hook in self.hooks}
        self._is_training = _training_rows(store, self.hooks, held_out_fraction, split_seed)
        self._block_rows = max(array.layout.chunk_rows for array in self._arrays.values())
        edges = np.arange(0, store.n_rows, self._block_rows)
        self._block_counts = np.add.reduceat(self._is_training, edges, dtype=np.int64)
        self.n_rows = int(self._is_training.sum())
        self._n_pools = max(1, -(-self.n_rows // max(1, pool_rows)))
        if not 1 <= batch_rows <= self.n_rows:
            raise ConfigError(
                f"{store.id} has {self.n_rows:,} training rows (held-out prompts and massive rows left out), "
                f"too few for a batch of {batch_rows:,}. Use smaller batches or harvest more tokens."
            )

    @property
    def n_steps_per_epoch(self) -> int:
        """Whole batches in one pass over the training rows."""
        return self.n_rows // self.batch_rows

    def batches(self, first_step: int, n_steps: int) -> Iterator[Batch]:
        """Yield batches `first_step` to `first_step + n_steps` (exclusive), each hook's rows in float32.

        Epochs follow one another. Raises ArtifactDamagedError if a chunk differs from its checksum.
        """
        return _in_background(self._gathered(first_step, first_step + n_steps))

    def _gathered(self, first_step: int, last_step: int) -> Generator[Batch]:
        """Yield the batches, each filled from as many segments as it takes."""
        batch, n_filled = self._empty_batch(), 0
        buffers = {
            hook: np.empty((self.batch_rows, *value.shape[1:]), self._stored_dtype) for hook, value in batch.items()
        }
        for loaded in self._loaded(self._segments(first_step, last_step)):
            start = 0
            while start < len(loaded.order):
                taken = loaded.order[start : start + self.batch_rows - n_filled]
                into = slice(n_filled, n_filled + len(taken))
                for hook, rows in loaded.rows.items():
                    gathered = np.take(rows, taken, axis=0, out=buffers[hook][into], mode="clip")
                    decode(gathered, self._dtype, batch[hook].numpy()[into])
                start, n_filled = start + len(taken), into.stop
                if n_filled == self.batch_rows:
                    yield batch
                    batch, n_filled = self._empty_batch(), 0

    @property
    def _stored_dtype(self) -> np.dtype:
        return numpy_dtype(self._dtype)

    def _empty_batch(self) -> Batch:
        return {hook: torch.empty(self.batch_rows, array.layout.width) for hook, array in self._arrays.items()}

    def _segments(self, first_step: int, last_step: int) -> Iterator[_Segment]:
        """Yield the parts of pools that the steps' rows lie in, in order."""
        n_steps = self.n_steps_per_epoch
        for number in range(first_step // n_steps, -(-last_step // n_steps)):
            epoch = self._epoch(number)
            first = max(first_step - number * n_steps, 0) * self.batch_rows
            last = min(last_step - number * n_steps, n_steps) * self.batch_rows
            for pool, (low, high) in enumerate(zip(epoch.starts[:-1], epoch.starts[1:], strict=True)):
                start, stop = max(first, int(low)), min(last, int(high))
                if start < stop:
                    yield _Segment(epoch, pool, start - int(low), stop - int(low))

    def _epoch(self, number: int) -> _Epoch:
        """Order the blocks and cut the order into pools of about equal numbers of training rows."""
        blocks = self._random(_BLOCK_STREAM, number).permutation(len(self._block_counts))
        ends = np.cumsum(self._block_counts[blocks])
        begins = ends - self._block_counts[blocks]
        pool_of_block = begins * self._n_pools // self.n_rows
        edges = np.searchsorted(pool_of_block, np.arange(self._n_pools + 1))
        return _Epoch(number, blocks, edges, np.concatenate([begins, ends[-1:]])[edges])

    def _loaded(self, segments: Iterator[_Segment]) -> Iterator[_Loaded]:
        """Yield segments in memory, the next one being read meanwhile; two sets of buffers take turns."""
        buffers: list[Rows] = [{} for _ in range(_N_POOL_BUFFERS)]
        with ThreadPoolExecutor(1, thread_name_prefix="pool-reader") as executor:
            waiting = None
            for turn, segment in enumerate(segments):
                following = executor.submit(self._load, segment, buffers[turn % _N_POOL_BUFFERS])
                if waiting is not None:
                    yield waiting.result()
                waiting = following
            if waiting is not None:
                yield waiting.result()

    def _load(self, segment: _Segment, buffers: Rows) -> _Loaded:
        """Read a segment's pool, whole blocks one after the other, and permute its training rows."""
        epoch = segment.epoch
        blocks = epoch.blocks[epoch.edges[segment.pool] : epoch.edges[segment.pool + 1]]
        starts = blocks * self._block_rows
        stops = np.minimum(starts + self._block_rows, len(self._is_training))
        places = np.concatenate([[0], np.cumsum(stops - starts)])
        for hook, array in self._arrays.items():
            if len(buffers.get(hook, ())) < places[-1]:
                buffers[hook] = np.empty((int(places[-1]), array.layout.width), self._stored_dtype)
            for start, low, high in zip(starts, places[:-1], places[1:], strict=True):
                array.read_into(buffers[hook][low:high], int(start))
        flags = np.concatenate([self._is_training[a:b] for a, b in zip(starts, stops, strict=True)])
        order = self._random(_ROW_STREAM, epoch.number, segment.pool).permutation(np.flatnonzero(flags))
        return _Loaded({hook: buffers[hook] for hook in self.hooks}, order[segment.start : segment.stop])

    def _random(self, *stream: int) -> np.random.Generator:
        """Return the generator of one stream: the same whenever and wherever it is asked for."""
        return np.random.Generator(np.random.Philox(np.random.SeedSequence([self._seed, *stream])))


def _training_rows(
    store: "ActivationStore", hooks: Sequence[str], held_out_fraction: float, split_seed: int
) -> Bool[np.ndarray, " row"]:
    """Say for each row whether it is for training: prompt not held out, and massive at none of the hook points."""
    training, _ = store.prompt_split(held_out_fraction, split_seed)
    for hook in hooks:
        training &= ~store.massive(hook)
    return training


_END = object()


def _in_background(items: Generator[Batch]) -> Iterator[Batch]:
    """Yield what a generator yields, made ahead of use in a thread that ends when the caller stops asking."""
    ready: queue.Queue[object] = queue.Queue(_N_READY_BATCHES)
    stopped = threading.Event()

    def produce() -> None:
        try:
            for item in items:
                _put(ready, item, stopped)
                if stopped.is_set():
                    return
            _put(ready, _END, stopped)
        except Exception as error:
            _put(ready, error, stopped)
        finally:
            items.close()

    thread = threading.Thread(target=produce, name="batch-gatherer", daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not _END:
            if isinstance(item, Exception):
                raise item
            yield item  # pyright: ignore[reportReturnType]
    finally:
        stopped.set()
        thread.join()


def _put(ready: "queue.Queue[object]", item: object, stopped: threading.Event) -> None:
    """Put an item as soon as there is room, unless nobody waits for it any more."""
    while not stopped.is_set():
        try:
            ready.put(item, timeout=0.1)
        except queue.Full:
            continue
        return
