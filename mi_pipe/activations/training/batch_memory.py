"""Memory of batches, allocated once and lent out: a batch's memory comes back when the last tensor over it is gone.

So a batch stays what it is for as long as anyone holds it or a view of it, and no memory is allocated as long as no
more batches are held than there were before (allocating afresh costs more than filling: pages are faulted in).
How: each loan is a tensor over a NumPy view of the memory; PyTorch keeps the view as long as any tensor of that storage
lives, and the view's end is what puts the memory back.
"""

import queue
import weakref
from collections.abc import Mapping

import numpy as np
import torch
from jaxtyping import Shaped
from torch import Tensor

Batch = dict[str, Shaped[Tensor, "batch width"]]

_ALIGNMENT = 64


class BatchMemory:
    """Memory for batches of several hook points; it grows when all of it is lent out."""

    def __init__(self, shapes: Mapping[str, tuple[int, int]], dtype: torch.dtype, pinned: bool) -> None:
        """Hold batches of `shapes` (rows, width) by hook point; `pinned` is what fast copies to CUDA need."""
        self._shapes = dict(shapes)
        self._dtype = dtype
        self._pinned = pinned
        # Loans may end in any thread, even inside a put: of the queues only this one allows that.
        self._free: queue.SimpleQueue[Slot] = queue.SimpleQueue()
        self.n_slots = 0

    def slot(self) -> "Slot":
        """Return memory that nobody holds; it comes back when what `Slot.lend` returns is dropped."""
        try:
            return self._free.get_nowait()
        except queue.Empty:
            self.n_slots += 1
            return Slot(self._shapes, self._dtype, self._pinned, self._free)


class Slot:
    """The memory of one batch."""

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, int]],
        dtype: torch.dtype,
        pinned: bool,
        free: "queue.SimpleQueue[Slot]",
    ) -> None:
        """Allocate; `free` is where the slot is put when a loan ends."""
        self._shapes = shapes
        self._dtype = dtype
        self._free = free
        size = sum(self._n_bytes(shape) for shape in shapes.values())
        self._bytes = torch.empty(size, dtype=torch.uint8, pin_memory=pinned).numpy()
        self.tensors = self._views(torch.from_numpy(self._bytes))
        """To be filled."""

    def lend(self) -> Batch:
        """Return the batch; the slot is free again when the last tensor or view of it is dropped."""
        view = self._bytes[:]
        weakref.finalize(view, self._free.put, self).atexit = False
        return self._views(torch.from_numpy(view))

    def _views(self, whole: Shaped[Tensor, " byte"]) -> Batch:
        batch: Batch = {}
        start = 0
        for hook, (n_rows, width) in self._shapes.items():
            used = n_rows * width * self._dtype.itemsize
            batch[hook] = whole[start : start + used].view(self._dtype).view(n_rows, width)
            start += self._n_bytes((n_rows, width))
        return batch

    def _n_bytes(self, shape: tuple[int, int]) -> int:
        n_bytes = int(np.prod(shape)) * self._dtype.itemsize
        return -(-n_bytes // _ALIGNMENT) * _ALIGNMENT
