"""What is known only when every shard is there: the median norm, massive rows, and each hook point's statistics."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Float, Shaped

from mi_pipe.activations.covariance import Scatter, shard_scatter, without
from mi_pipe.activations.harvest.scatter_files import ScatterFiles
from mi_pipe.activations.harvest.sums_file import read_sums
from mi_pipe.activations.layout import ArrayLayout, StoreLayout
from mi_pipe.activations.raw_array import RawArray
from mi_pipe.activations.statistics import HookStatistics, ShardSums, combine, massive_threshold, shard_sums
from mi_pipe.activations.storage_dtype import decode
from mi_pipe.core.place import Place


@dataclass(frozen=True)
class HookTotal:
    """The whole store's statistics at one hook point, and which rows they leave out."""

    statistics: HookStatistics
    massive: Bool[np.ndarray, " row"]


def totals(group: Place, scratch: Place, layout: StoreLayout, massive_factor: float) -> dict[str, HookTotal]:
    """Add up the sums of all shards, in shard order."""
    shards = [read_sums(scratch, shard) or _sums_of_stored(group, layout, shard) for shard in range(layout.n_shards)]
    found: dict[str, HookTotal] = {}
    for array in layout.arrays:
        sums = [of_shard[array.name] for of_shard in shards]
        found[array.name] = total = _total(group, array, sums, massive_factor)
        if array.name in layout.with_covariance:
            covariance = _covariance(group, scratch, layout, array, sums, total.massive)
            found[array.name] = replace(total, statistics=replace(total.statistics, covariance=covariance))
    return found


def _sums_of_stored(group: Place, layout: StoreLayout, shard: int) -> dict[str, ShardSums]:
    """Compute a shard's sums again from its stored rows."""
    return {
        array.name: shard_sums(_stored_chunks(group, layout, array, shard), array.store_dtype, array.width)
        for array in layout.arrays
    }


def _stored_chunks(
    group: Place, layout: StoreLayout, array: ArrayLayout, shard: int
) -> Iterator[Shaped[np.ndarray, "row width"]]:
    """Yield the rows of a shard chunk by chunk, as the writer has them."""
    stored = RawArray(group, array.name)
    start, stop = layout.bounds(shard)
    for first in range(start, stop, array.chunk_rows):
        yield stored.read(first, min(stop, first + array.chunk_rows))


def _total(group: Place, array: ArrayLayout, shards: list[ShardSums], factor: float) -> HookTotal:
    norms = np.concatenate([sums.norms for sums in shards])
    _, threshold = massive_threshold(norms, factor)
    massive = norms > threshold
    return HookTotal(combine(shards, massive, _values(group, array, massive), factor), massive)


def _covariance(
    group: Place,
    scratch: Place,
    layout: StoreLayout,
    array: ArrayLayout,
    shards: list[ShardSums],
    massive: Bool[np.ndarray, " row"],
) -> Float[np.ndarray, "width width"]:
    """Merge the scatters of all shards and take the massive rows out."""

    def of_shard(shard: int) -> Scatter:
        chunks = list(_stored_chunks(group, layout, array, shard))
        return shard_scatter(chunks, array.store_dtype, shards[shard])

    total = ScatterFiles(scratch, array.name, layout.n_shards).total(of_shard)
    return without(total, _values(group, array, massive)).covariance


def _values(group: Place, array: ArrayLayout, rows: Bool[np.ndarray, " row"]) -> Float[np.ndarray, "row width"]:
    # Checksums were computed from these very bytes while writing; reading a few rows back needs no second check.
    stored = RawArray(group, array.name, verify=False).take(np.flatnonzero(rows))
    return decode(stored, array.store_dtype)
