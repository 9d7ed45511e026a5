"""Copies imported rows into an activation store, shard by shard, as a harvest writes them: same files, same commits.

The shards that have a commit record of the same plan are left as they are, so an import that was killed goes on.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mi_pipe.activations.commits import COMMITS_FOLDER, Commit, committed
from mi_pipe.activations.group import create_group, plan_of_group, remove_group
from mi_pipe.activations.harvest.sums_file import SUMS_FOLDER
from mi_pipe.activations.harvest.writer import ShardWriter
from mi_pipe.activations.layout import ArrayLayout, StoreLayout, chunk_rows_for, shard_rows_for
from mi_pipe.activations.storage_dtype import as_stored, numpy_dtype, torch_store_dtype
from mi_pipe.core.canonical import content_hash
from mi_pipe.core.place import Place
from mi_pipe.export.source import Source

_WIDEST_COVARIANCE = 1024


def layout_of(source: Source, shard_rows: int | None) -> StoreLayout:
    """Return where the rows will lie; shards are as large as asked for, as they were, or as a harvest makes them.

    Covariances are kept where they were, or of hook points up to 1,024 wide: no more time than reading the rows.
    """
    n_rows, dtype = source.labels.n_rows, source.store_dtype
    shapes = {hook: _token_shape(source, hook) for hook in source.arrays}
    bytes_of = {hook: int(np.prod(shape)) * numpy_dtype(dtype).itemsize for hook, shape in shapes.items()}
    known = None if source.origin is None else source.origin.shard_rows
    rows = shard_rows or known or shard_rows_for(n_rows, max(bytes_of.values()))
    arrays = [
        ArrayLayout(hook, shape, _dimension(source, hook), dtype, chunk_rows_for(bytes_of[hook], rows), rows)
        for hook, shape in shapes.items()
    ]
    narrow = frozenset(array.name for array in arrays if array.width <= _WIDEST_COVARIANCE)
    kept = narrow if source.origin is None else source.origin.with_covariance & source.arrays.keys()
    return StoreLayout(n_rows, rows, tuple(arrays), frozenset(kept))


def _token_shape(source: Source, hook: str) -> tuple[int, ...]:
    return source.arrays[hook].shape[1:] if source.origin is None else source.origin.token_shapes[hook]


def _dimension(source: Source, hook: str) -> str:
    if source.origin is not None:
        return source.origin.dimensions[hook]
    return f"width_{int(np.prod(_token_shape(source, hook)))}"


@dataclass(frozen=True)
class ImportJob:
    """A source, its layout, and where the store goes."""

    source: Source
    layout: StoreLayout
    contents: dict[str, Any]
    """What identifies the files, by their digests."""
    place: Place
    scratch: Place

    @cached_property
    def plan(self) -> str:
        """Hash of what decides every byte."""
        arrays = [[a.name, list(a.token_shape), a.store_dtype, a.chunk_rows] for a in self.layout.arrays]
        return content_hash({"import": self.contents, "shard_rows": self.layout.shard_rows, "arrays": arrays})

    def prepare(self, building: Path, attributes: dict[str, Any]) -> None:
        """Make the group unless it is there; what another plan left is removed."""
        if plan_of_group(self.place) == self.plan:
            return
        for place, folder in ((self.place, COMMITS_FOLDER), (self.scratch, SUMS_FOLDER)):
            for key in [*place.keys(folder)]:
                place.remove(key)
        remove_group(self.place)
        labels = self.source.labels
        known = {
            "plan_hash": self.plan,
            "hooks": list(self.source.arrays),
            "shard_rows": self.layout.shard_rows,
            "n_tokens": labels.n_rows,
            "n_prompts": labels.n_prompts,
            "store_dtype": self.source.store_dtype,
        }
        create_group(
            self.place, building, self.layout, labels.row_arrays, labels.prompt_offset, {**attributes, **known}
        )

    def commits(self) -> dict[int, Commit]:
        """Return the records of the shards that are done."""
        found = {i: committed(self.place, self.layout, self.plan, i) for i in range(self.layout.n_shards)}
        return {shard: commit for shard, commit in found.items() if commit is not None}

    def fill(self, shards: Collection[int], on_commit: Callable[[int], None], on_rows: Callable[[int], None]) -> None:
        """Copy some shards; raises StorageOverflowError for values that do not fit the storage dtype."""
        with ShardWriter(self.place, self.scratch, self.layout, self.plan, on_commit) as writer:
            for shard in shards:
                buffers = writer.buffers()
                start, stop = self.layout.bounds(shard)
                for array in self.layout.arrays:
                    for first in range(start, stop, array.chunk_rows):
                        last = min(stop, first + array.chunk_rows)
                        values = self.source.arrays[array.name].read(first, last).reshape(last - first, -1)
                        stored = as_stored(values.to(torch_store_dtype(array.store_dtype)).contiguous())
                        buffers[array.name].put(np.arange(first - start, last - start), stored)
                writer.submit(shard, buffers)
                on_rows(stop)
