"""Gathers the rows that leave pools into batches, as they are stored or widened to float32."""

from collections.abc import Generator, Iterable, Mapping
from typing import Literal

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from mi_pipe.activations.storage_dtype import StoreDType, as_stored, torch_store_dtype
from mi_pipe.activations.training.batch_memory import Batch, BatchMemory, Slot
from mi_pipe.activations.training.pool_reader import Pool

BatchDType = Literal["float32", "stored"]

_PIECE = (1 << 15) - 1
"""Values of one copy: few enough for PyTorch to stay in the calling thread, however many it may use."""


class BatchGatherer:
    """Makes batches of `batch_rows` rows of several hook points."""

    def __init__(
        self, widths: Mapping[str, int], store_dtype: StoreDType, batch_rows: int, dtype: BatchDType, pinned: bool
    ) -> None:
        """Give batches in float32 or in the stored dtype, in pinned memory or not."""
        self._batch_rows = batch_rows
        shapes = {hook: (batch_rows, width) for hook, width in widths.items()}
        stored = torch_store_dtype(store_dtype)
        self._widens = dtype == "float32" and stored != torch.float32
        self._memory = BatchMemory(shapes, torch.float32 if self._widens else stored, pinned)
        self._staging = BatchMemory(shapes, stored, pinned=False).slot() if self._widens else None
        self._pieces: dict[Slot, list[tuple[Tensor, Tensor]]] = {}

    @property
    def n_slots(self) -> int:
        """Batches for which there is memory by now."""
        return self._memory.n_slots

    def batches(self, pools: Iterable[Pool]) -> Generator[Batch]:
        """Yield the batches, each filled from as many pools as it takes; what does not fill one is left out."""
        slot, n_filled = self._memory.slot(), 0
        for pool in pools:
            start = 0
            while start < len(pool.leaving):
                taken = pool.leaving[start : start + self._batch_rows - n_filled]
                self._gather(pool, taken, slot, n_filled)
                start, n_filled = start + len(taken), n_filled + len(taken)
                if n_filled == self._batch_rows:
                    self._widen(slot)
                    yield slot.lend()
                    slot, n_filled = self._memory.slot(), 0

    def _gather(self, pool: Pool, places: Int[np.ndarray, " row"], slot: Slot, start: int) -> None:
        """Copy rows of a pool into a batch, from its row `start` on, as they are stored."""
        target = slot if self._staging is None else self._staging
        for hook, rows in pool.rows.items():
            out = as_stored(target.tensors[hook])[start : start + len(places)]
            # mode="clip" writes straight to `out`; the default would gather into a buffer first, at half the speed.
            np.take(rows, places, axis=0, out=out, mode="clip")

    def _widen(self, slot: Slot) -> None:
        """Convert the gathered rows to float32, exactly."""
        if self._staging is None:
            return
        if slot not in self._pieces:
            self._pieces[slot] = [
                pair
                for hook, values in slot.tensors.items()
                for pair in zip(
                    values.view(-1).split(_PIECE), self._staging.tensors[hook].view(-1).split(_PIECE), strict=True
                )
            ]
        for values, stored in self._pieces[slot]:
            values.copy_(stored)
