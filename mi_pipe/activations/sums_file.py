"""Partial sums of unfinished harvests in scratch space: one safetensors file a shard, gone after publishing."""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from mi_pipe.activations.statistics import ShardSums
from mi_pipe.core.atomic import atomic_path

SUMS_FOLDER = "sums"
_FIELDS = ("norms", "total", "squares")


def sums_path(scratch: Path, shard: int) -> Path:
    """Return where a shard's sums lie in scratch space."""
    return scratch / SUMS_FOLDER / f"{shard:06d}.safetensors"


def write_sums(scratch: Path, shard: int, sums: dict[str, ShardSums]) -> None:
    """Write the sums of every hook point of a shard, atomically and durably."""
    tensors = {
        f"{field}:{hook}": torch.from_numpy(getattr(item, field)) for hook, item in sums.items() for field in _FIELDS
    }
    with atomic_path(sums_path(scratch, shard)) as temp:
        save_file(tensors, temp)


def read_sums(scratch: Path, shard: int) -> dict[str, ShardSums] | None:
    """Return the sums of every hook point of a shard, or None if they are not there whole."""
    try:
        tensors = load_file(sums_path(scratch, shard))
    except (OSError, SafetensorError):
        return None
    hooks = {key.partition(":")[2] for key in tensors}
    return {hook: ShardSums(*(tensors[f"{field}:{hook}"].numpy() for field in _FIELDS)) for hook in hooks}
