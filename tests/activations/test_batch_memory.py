"""Memory of batches comes back when the last view of a batch is gone, and never before."""

import gc

import pytest
import torch

from mi_pipe.activations.training.batch_memory import BatchMemory

SHAPES = {"a": (5, 3), "b": (5, 7)}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_batch_is_what_its_slot_was_filled_with(dtype):
    slot = BatchMemory(SHAPES, dtype, pinned=False).slot()
    for hook, values in slot.tensors.items():
        values.copy_(torch.arange(values.numel()).view(values.shape) + len(hook))
    batch = slot.lend()
    assert {hook: (values.shape, values.dtype) for hook, values in batch.items()} == {
        hook: (shape, dtype) for hook, shape in SHAPES.items()
    }
    assert all(torch.equal(values, slot.tensors[hook]) for hook, values in batch.items())
    assert batch["a"].data_ptr() == slot.tensors["a"].data_ptr()


@pytest.mark.parametrize(
    "keep",
    [
        lambda batch: batch,
        lambda batch: batch["b"],
        lambda batch: batch["a"][1:3, :2],
        lambda batch: batch["b"].numpy(),
        lambda batch: batch["b"].T.numpy()[2:],
        lambda batch: batch["a"].untyped_storage(),
    ],
)
def test_any_view_of_a_batch_keeps_its_memory(keep):
    memory = BatchMemory(SHAPES, torch.float32, pinned=False)
    held = keep(memory.slot().lend())
    assert memory.slot() is not None
    assert memory.n_slots == 2
    del held
    assert memory.slot() is not None
    assert memory.n_slots == 2


def test_memory_goes_round_without_growing_and_without_the_garbage_collector():
    memory = BatchMemory(SHAPES, torch.float16, pinned=False)
    gc.disable()
    try:
        held = []
        for _ in range(100):
            held = [*held[-2:], memory.slot().lend()]
    finally:
        gc.enable()
    assert memory.n_slots <= 4
