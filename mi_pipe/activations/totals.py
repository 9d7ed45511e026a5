"""What is known only when every shard is there: the median norm, massive rows, and each hook point's statistics."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool

from mi_pipe.activations.layout import ArrayLayout, StoreLayout
from mi_pipe.activations.raw_array import RawArray
from mi_pipe.activations.statistics import HookStatistics, ShardSums, combine, massive_threshold, shard_sums
from mi_pipe.activations.storage_dtype import decode
from mi_pipe.activations.sums_file import read_sums
from mi_pipe.core.place import Place


@dataclass(frozen=True)
class HookTotal:
    """The whole store's statistics at one hook point, and which rows they leave out."""

    statistics: HookStatistics
    massive: Bool[np.ndarray, " row"]


def totals(group: Place, scratch: Place, layout: StoreLayout, massive_factor: float) -> dict[str, HookTotal]:
    """Add up the sums of all shards, in shard order."""
    shards = [read_sums(scratch, shard) or _sums_of_stored(group, layout, shard) for shard in range(layout.n_shards)]
    return {
        array.name: _total(group, array, [sums[array.name] for sums in shards], massive_factor)
        for array in layout.arrays
    }


def _sums_of_stored(group: Place, layout: StoreLayout, shard: int) -> dict[str, ShardSums]:
    """Compute a shard's sums again from its stored rows, chunk by chunk as the writer does."""
    start, stop = layout.bounds(shard)
    sums = {}
    for array in layout.arrays:
        stored = RawArray(group, array.name)
        edges = range(start, stop, array.chunk_rows)
        chunks = (stored.read(first, min(stop, first + array.chunk_rows)) for first in edges)
        sums[array.name] = shard_sums(chunks, array.store_dtype, array.width)
    return sums


def _total(group: Place, array: ArrayLayout, shards: list[ShardSums], factor: float) -> HookTotal:
    norms = np.concatenate([sums.norms for sums in shards])
    _, threshold = massive_threshold(norms, factor)
    massive = norms > threshold
    # Checksums were computed from these very bytes while writing; reading a few rows back needs no second check.
    stored = RawArray(group, array.name, verify=False).take(np.flatnonzero(massive))
    return HookTotal(combine(shards, massive, decode(stored, array.store_dtype), factor), massive)
