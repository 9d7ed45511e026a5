"""The plan of a harvest: which token becomes which row, and which prompts are run together; fixed before any work.

Rows are the kept tokens in prompt order. Batches (mi_pipe/activations/harvest/batches.py) are fixed too, because what
is run together changes the last bits: shard i is a pure function of (plan, i), and a batch whose rows lie in two shards
is run whole for each, or carried over when they are done one after the other. A plan that did not fit into memory has
its batches halved, all of them, and is another plan.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from mi_pipe.activations.harvest.batches import Batching, form_batches
from mi_pipe.activations.layout import StoreLayout
from mi_pipe.activations.tokens import Tokens
from mi_pipe.core.canonical import content_hash

BATCH_RULE = 2
"""Counted up when other prompts are put together than before, so that no harvest goes on in the middle."""
_SAMPLE_TOKENS = 4096


@dataclass(frozen=True)
class Batch:
    """Prompts that are run together, shorter ones padded on the right, and the rows that their kept tokens become."""

    number: int
    tokens: Int[np.ndarray, "batch pos"]
    kept: Bool[np.ndarray, "batch pos"]
    rows: Int[np.ndarray, " row"]
    """Row numbers of the kept tokens, in the order of `kept`; ascending."""


class HarvestPlan:
    """Tokens, layout and batches of one harvest."""

    def __init__(self, tokens: Tokens, layout: StoreLayout, batching: Batching, identity: dict[str, Any]) -> None:
        """Fix the batches; `identity` is what else decides the values (model, precision)."""
        assert layout.n_rows == tokens.n_rows, "the layout is for these tokens"
        self.tokens = tokens
        self.layout = layout
        self._sample_tokens = min(_SAMPLE_TOKENS, batching.batch_tokens >> batching.halvings)
        self._batches = form_batches(tokens.lengths, tokens.row_offsets, layout.shard_rows, batching)
        self._shards = [self._shards_of(prompts) for prompts in self._batches]
        self._by_shard: list[list[int]] = [[] for _ in range(layout.n_shards)]
        for number, shards in enumerate(self._shards):
            for shard in shards:
                self._by_shard[shard].append(number)
        self.hash = self._hash(batching, identity)

    @property
    def n_batches(self) -> int:
        """Number of batches."""
        return len(self._batches)

    @property
    def largest_batch(self) -> int:
        """Number of prompts of the largest batch."""
        return max(len(prompts) for prompts in self._batches)

    def batches_of(self, shard: int) -> list[int]:
        """Return the batches that have rows in a shard, ascending."""
        return self._by_shard[shard]

    def last_shard(self, batch: int) -> int:
        """Return the last shard that a batch has rows in."""
        return self._shards[batch][-1]

    def batch(self, number: int) -> Batch:
        """Return one batch."""
        prompts = self._batches[number]
        lengths = self.tokens.lengths[prompts]
        pos = np.arange(int(lengths.max()))
        is_token = pos < lengths[:, None]
        at = np.where(is_token, self.tokens.offsets[prompts][:, None] + pos, 0)
        first, stop = self.tokens.row_offsets[prompts], self.tokens.row_offsets[prompts + 1]
        rows = np.concatenate([np.arange(a, b) for a, b in zip(first, stop, strict=True)])
        return Batch(number, self.tokens.ids[at], self.tokens.kept[at] & is_token, rows)

    def sample(self, n_prompts: int) -> Iterator[tuple[Int[np.ndarray, "b pos"], Bool[np.ndarray, "b pos"]]]:
        """Yield exact batches of prompts spread evenly over the set, and what of them is kept, for measuring."""
        have_rows = np.flatnonzero(np.diff(self.tokens.row_offsets))
        spread = np.linspace(0, len(have_rows) - 1, min(n_prompts, len(have_rows))).astype(np.int64)
        prompts = have_rows[spread]
        lengths = self.tokens.lengths[prompts]
        for length in np.unique(lengths):
            same = prompts[lengths == length]
            size = max(1, self._sample_tokens // int(length))
            for start in range(0, len(same), size):
                at = self.tokens.offsets[same[start : start + size]][:, None] + np.arange(length)
                yield self.tokens.ids[at], self.tokens.kept[at]

    def _shards_of(self, prompts: Int[np.ndarray, " prompt"]) -> list[int]:
        first = self.tokens.row_offsets[prompts] // self.layout.shard_rows
        last = (self.tokens.row_offsets[prompts + 1] - 1) // self.layout.shard_rows
        return sorted({shard for a, b in zip(first, last, strict=True) for shard in range(int(a), int(b) + 1)})

    def _hash(self, batching: Batching, identity: dict[str, Any]) -> str:
        tokens, layout = self.tokens, self.layout
        arrays = [tokens.ids.astype("<i4"), tokens.offsets.astype("<i8"), np.packbits(tokens.kept)]
        return content_hash(
            {
                "tokens": [hashlib.sha256(array.data).hexdigest() for array in arrays],
                "shard_rows": layout.shard_rows,
                "arrays": [[a.name, list(a.token_shape), a.store_dtype, a.chunk_rows] for a in layout.arrays],
                **asdict(batching),
                "batch_rule": BATCH_RULE,
                **identity,
            }
        )
