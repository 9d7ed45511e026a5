"""Partial sums of unfinished harvests in scratch space: one safetensors file a shard, gone after publishing."""

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from mi_pipe.activations.statistics import ShardSums
from mi_pipe.core.place import Place

SUMS_FOLDER = "sums"
_FIELDS = ("norms", "total", "squares")


def sums_key(shard: int) -> str:
    """Return where a shard's sums lie in scratch space."""
    return f"{SUMS_FOLDER}/{shard:06d}.safetensors"


def write_sums(scratch: Place, shard: int, sums: dict[str, ShardSums]) -> None:
    """Write the sums of every hook point of a shard, atomically and durably."""
    tensors = {
        f"{field}:{hook}": torch.from_numpy(getattr(item, field)) for hook, item in sums.items() for field in _FIELDS
    }
    scratch.write(sums_key(shard), save(tensors))


def read_sums(scratch: Place, shard: int) -> dict[str, ShardSums] | None:
    """Return the sums of every hook point of a shard, or None if they are not there whole."""
    try:
        tensors = load(scratch.read(sums_key(shard)))
    except (FileNotFoundError, SafetensorError):
        return None
    hooks = {key.partition(":")[2] for key in tensors}
    return {hook: ShardSums(*(tensors[f"{field}:{hook}"].numpy() for field in _FIELDS)) for hook in hooks}
