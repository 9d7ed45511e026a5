"""What is known only when every shard is there: the median norm, massive rows, and each hook point's statistics."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool

from mi_pipe.activations.layout import ArrayLayout, StoreLayout
from mi_pipe.activations.raw_array import RawArray
from mi_pipe.activations.statistics import HookStatistics, ShardSums, combine, massive_threshold
from mi_pipe.activations.storage_dtype import decode
from mi_pipe.activations.sums_file import read_sums


@dataclass(frozen=True)
class HookTotal:
    """The whole store's statistics at one hook point, and which rows they leave out."""

    statistics: HookStatistics
    massive: Bool[np.ndarray, " row"]


def totals(group: Path, scratch: Path, layout: StoreLayout, massive_factor: float) -> dict[str, HookTotal]:
    """Add up the sums of all shards, in shard order."""
    shards = [read_sums(scratch, shard) for shard in range(layout.n_shards)]
    return {
        array.name: _total(group, array, [sums[array.name] for sums in shards if sums is not None], massive_factor)
        for array in layout.arrays
    }


def _total(group: Path, array: ArrayLayout, shards: list[ShardSums], factor: float) -> HookTotal:
    norms = np.concatenate([sums.norms for sums in shards])
    _, threshold = massive_threshold(norms, factor)
    massive = norms > threshold
    # Checksums were computed from these very bytes while writing; reading a few rows back needs no second check.
    stored = RawArray(group, array.name, verify=False).take(np.flatnonzero(massive))
    return HookTotal(combine(shards, massive, decode(stored, array.store_dtype), factor), massive)
