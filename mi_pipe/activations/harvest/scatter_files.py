"""Scatters of an unfinished harvest in scratch space, merged as they come along a fixed binary tree.

Node (level, i) is the scatter of shards [i 2^level, (i + 1) 2^level), merged from its two children. Which shards come
first changes neither the tree nor a bit of its root; merging early only keeps the files few: about as many as the
logarithm of the number of shards. What is missing is computed from the stored rows. A parent is written before its
children are removed, so a process may be killed anywhere, and two may do the same at once.
"""

from collections.abc import Callable
from typing import TypeAlias

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from mi_pipe.activations.covariance import Scatter, merged
from mi_pipe.activations.harvest.sums_file import SUMS_FOLDER
from mi_pipe.activations.layout import ArrayLayout
from mi_pipe.core.place import Place

_Node: TypeAlias = tuple[int, int]
_DOUBLE_BYTES = 8


def is_worth_keeping(array: ArrayLayout) -> bool:
    """Say whether a shard's scatter is smaller than the shard: a larger one is better computed at the end."""
    return array.shard_rows * array.row_bytes >= _DOUBLE_BYTES * array.width**2


class ScatterFiles:
    """The scatters of one hook point."""

    def __init__(self, scratch: Place, hook: str, n_shards: int) -> None:
        """Keep them below `scratch`."""
        self._scratch = scratch
        self._folder = f"{SUMS_FOLDER}/scatter/{hook}"
        self._n_shards = n_shards

    def add(self, shard: int, scatter: Scatter) -> None:
        """Keep a shard's scatter, and merge what can be merged."""
        level, number = 0, shard
        if any(self._has((above, shard >> above)) for above in range(self._n_shards.bit_length() + 1)):
            return
        self._write((level, number), scatter)
        while (sibling := self._read((level, number ^ 1))) is not None:
            pair = (scatter, sibling) if number % 2 == 0 else (sibling, scatter)
            scatter = merged(*pair)
            self._write((level + 1, number >> 1), scatter)
            for child in (number, number ^ 1):
                self._scratch.remove(self._key((level, child)))
            level, number = level + 1, number >> 1

    def total(self, of_shard: Callable[[int], Scatter]) -> Scatter:
        """Return the scatter of all shards; `of_shard` computes that of a shard of which none is kept."""
        return self._node(((self._n_shards - 1).bit_length(), 0), of_shard)

    def _node(self, node: _Node, of_shard: Callable[[int], Scatter]) -> Scatter:
        level, number = node
        if (kept := self._read(node)) is not None:
            return kept
        if level == 0:
            return of_shard(number)
        first = self._node((level - 1, 2 * number), of_shard)
        if (2 * number + 1) << (level - 1) >= self._n_shards:
            return first
        return merged(first, self._node((level - 1, 2 * number + 1), of_shard))

    def _key(self, node: _Node) -> str:
        level, number = node
        return f"{self._folder}/{level:02d}-{number:06d}.safetensors"

    def _has(self, node: _Node) -> bool:
        return self._scratch.size(self._key(node)) is not None

    def _read(self, node: _Node) -> Scatter | None:
        try:
            tensors = load(self._scratch.read(self._key(node)))
        except (FileNotFoundError, SafetensorError):
            return None
        return Scatter(int(tensors["n_rows"]), tensors["mean"].numpy(), tensors["matrix"].numpy())

    def _write(self, node: _Node, scatter: Scatter) -> None:
        tensors = {
            "n_rows": torch.tensor(scatter.n_rows),
            "mean": torch.from_numpy(scatter.mean),
            "matrix": torch.from_numpy(scatter.matrix),
        }
        self._scratch.write(self._key(node), save(tensors))
