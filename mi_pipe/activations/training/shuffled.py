"""Training batches in random order: random blocks from anywhere fill a pool, rows leave it shuffled.

The order is a function of (store, seed, epoch) alone and is described in `shuffle_order`; reading can begin at any
step at the cost of one pool. Three things go on at once: threads fill the next pool (`pool_reader`), a thread gathers
batches from the present one (`gatherer`), and the consumer works on those that are ready. All memory is allocated once:
two pools, and a few batches that come back when the consumer drops them (`batch_memory`).

A batch stays what it is for as long as its consumer holds it. On the CPU it is shared with everyone else who was given
it (`shared`), so it is not to be written to.
"""

import hashlib
from collections import deque
from collections.abc import Generator, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool

from mi_pipe.activations.row_array import RowArray
from mi_pipe.activations.storage_dtype import StoreDType
from mi_pipe.activations.training.batch_memory import Batch
from mi_pipe.activations.training.gatherer import BatchDType, BatchGatherer
from mi_pipe.activations.training.pool_reader import PoolReader
from mi_pipe.activations.training.prefetch import in_background
from mi_pipe.activations.training.shuffle_order import ShuffleOrder
from mi_pipe.activations.training.source import RowSource
from mi_pipe.activations.training.tee import tee
from mi_pipe.core.canonical import ID_DIGITS, content_hash
from mi_pipe.core.errors import ConfigError
from mi_pipe.core.place import LocalPlace

_N_READY_BATCHES = 4
_LOCAL_THREADS, _REMOTE_THREADS = 4, 16
"""Threads that fill pools: a disk needs a few requests at once to reach its rate, an object store many."""


class ShuffledReader:
    """Endless shuffled training rows of one or several hook points, row-aligned; begins at any step."""

    def __init__(
        self,
        store: RowSource,
        hooks: Sequence[str],
        batch_rows: int,
        seed: int = 0,
        pool_rows: int = 1 << 18,
        held_out_fraction: float = 0.05,
        split_seed: int = 0,
        where: str | Bool[np.ndarray, " row"] | None = None,
        n_threads: int | None = None,
    ) -> None:
        """Read `hooks` in batches of `batch_rows`, of all rows or those that `where` (condition or mask) picks.

        Held-out prompts and rows that are massive at one of the hook points are left out. `n_threads` fill the pools.
        Raises ConfigError if an epoch has no whole batch.
        """
        self.hooks = list(hooks)
        self.batch_rows = batch_rows
        self._arrays = {hook: store.array(hook) for hook in self.hooks}
        self._dtype: StoreDType = _common_dtype(self._arrays)
        self._n_threads = n_threads or (
            _LOCAL_THREADS if isinstance(store.group_place, LocalPlace) else _REMOTE_THREADS
        )
        is_training = _training_rows(store, self.hooks, held_out_fraction, split_seed, where)
        block_rows = max(array.layout.chunk_rows for array in self._arrays.values())
        if not 1 <= batch_rows <= is_training.sum():
            raise ConfigError(
                f"{store.id} has {is_training.sum():,} training rows (held-out prompts and massive rows left out), "
                f"too few for a batch of {batch_rows:,}. Use smaller batches or harvest more tokens."
            )
        self._order = ShuffleOrder(is_training, block_rows, batch_rows, pool_rows, seed)
        self._seed = seed
        self._identity = {"store": store.digest, "hooks": self.hooks, "batch_rows": batch_rows, "pool_rows": pool_rows}
        self._is_training = is_training

    @property
    def n_rows(self) -> int:
        """Rows that are trained on."""
        return self._order.n_rows

    @property
    def n_steps_per_epoch(self) -> int:
        """Whole batches in one pass over the training rows."""
        return self._order.n_steps_per_epoch

    def batches(
        self, first_step: int, n_steps: int, dtype: BatchDType = "float32", device: torch.device | str = "cpu"
    ) -> Generator[Batch]:
        """Yield batches `first_step` to `first_step + n_steps` (exclusive) by hook point; epochs follow one another.

        `dtype` is float32, or "stored" for what lies on disk, unconverted: float16, bfloat16 or float32. For a CUDA
        `device` rows travel as they are stored, through pinned memory, and are converted there. Raises
        ArtifactDamagedError if a chunk differs from its checksum, which is looked at when it is first read.
        """
        device = torch.device(device)
        is_remote = device.type != "cpu"
        widths = {hook: array.layout.width for hook, array in self._arrays.items()}
        gatherer = BatchGatherer(
            widths, self._dtype, self.batch_rows, "stored" if is_remote else dtype, pinned=device.type == "cuda"
        )
        pools = PoolReader(self._arrays, self._order, self._n_threads).pools(
            self._order.segments(first_step, first_step + n_steps)
        )
        ready = in_background(gatherer.batches(pools), _N_READY_BATCHES, "batch-gatherer")
        return _on_device(ready, device, dtype) if is_remote else ready

    def shared(
        self,
        n_consumers: int,
        first_step: int,
        n_steps: int,
        dtype: BatchDType = "float32",
        device: torch.device | str = "cpu",
    ) -> list[Generator[Batch]]:
        """Return as many iterators over the same batches, which are read once; see `tee` for how they keep together."""
        return tee(self.batches(first_step, n_steps, dtype, device), n_consumers)

    def state(self, step: int) -> dict[str, Any]:
        """Return, as JSON values, where `step` is in the stream and which stream that is."""
        epoch, within = divmod(step, self.n_steps_per_epoch)
        return {"stream": self._stream, "seed": self._seed, "epoch": epoch, "step": within}

    def step_of(self, state: dict[str, Any]) -> int:
        """Return the step to go on at; raises ConfigError if `state` is not of a reader that gives the same stream."""
        if (state["stream"], state["seed"]) != (self._stream, self._seed):
            raise ConfigError(
                f"The reader's state is of another stream (its seed is {state['seed']}, here {self._seed}; store, hook "
                "points, batch_rows, pool_rows and training rows have to be the same too). Begin at step 0."
            )
        return state["epoch"] * self.n_steps_per_epoch + state["step"]

    @cached_property
    def _stream(self) -> str:
        rows = hashlib.sha256(np.packbits(self._is_training).data).hexdigest()
        return content_hash({**self._identity, "rows": rows})[:ID_DIGITS]


def _common_dtype(arrays: Mapping[str, RowArray]) -> StoreDType:
    dtypes: set[StoreDType] = {array.layout.store_dtype for array in arrays.values()}
    if len(dtypes) != 1:
        raise ConfigError(f"{', '.join(arrays)} are stored as {', '.join(sorted(dtypes))}; read each on its own.")
    return dtypes.pop()


def _training_rows(
    store: RowSource,
    hooks: Sequence[str],
    held_out_fraction: float,
    split_seed: int,
    where: str | Bool[np.ndarray, " row"] | None,
) -> Bool[np.ndarray, " row"]:
    """Say for each row whether it is for training: wanted, prompt not held out, and massive at no hook point."""
    training, _ = store.prompt_split(held_out_fraction, split_seed)
    for hook in hooks:
        training &= ~store.massive(hook)
    if isinstance(where, str):
        wanted = np.zeros(store.n_rows, bool)
        wanted[store.rows(where)] = True
        return training & wanted
    return training if where is None else training & where


def _on_device(batches: Generator[Batch], device: torch.device, dtype: BatchDType) -> Generator[Batch]:
    """Yield batches on another device; a batch's host memory is kept until the device has its copy."""
    under_way: deque[tuple[torch.cuda.Event, Batch]] = deque()
    for batch in batches:
        moved = {hook: values.to(device, non_blocking=True) for hook, values in batch.items()}
        if device.type == "cuda":
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(device))
            under_way.append((event, batch))
            if len(under_way) > _N_READY_BATCHES:
                under_way[0][0].synchronize()
            while under_way and under_way[0][0].query():
                under_way.popleft()
        yield {hook: values.float() for hook, values in moved.items()} if dtype == "float32" else moved
