"""The tokens of a store's prompts, which of them become rows, and where each row's token stands."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Int


@dataclass(frozen=True)
class Tokens:
    """Prompts as arrays: prompt p is `ids[offsets[p]:offsets[p + 1]]`; `kept` says which tokens become rows."""

    ids: Int[np.ndarray, " token"]
    offsets: Int[np.ndarray, " boundary"]
    kept: Bool[np.ndarray, " token"]

    @property
    def n_prompts(self) -> int:
        """Number of prompts."""
        return len(self.offsets) - 1

    @property
    def lengths(self) -> Int[np.ndarray, " prompt"]:
        """Tokens of each prompt."""
        return np.diff(self.offsets)

    @cached_property
    def row_offsets(self) -> Int[np.ndarray, " boundary"]:
        """Where each prompt's rows begin, and where the last prompt's end; int64."""
        return np.concatenate([[0], np.cumsum(self.kept, dtype=np.int64)])[self.offsets]

    @property
    def n_rows(self) -> int:
        """Number of kept tokens."""
        return int(self.row_offsets[-1])

    def places(self, start: int, stop: int) -> Int[np.ndarray, " row"]:
        """Return where among all tokens the rows `start` to `stop` are."""
        first = int(np.searchsorted(self.row_offsets, start, "right")) - 1
        last = int(np.searchsorted(self.row_offsets, stop, "left"))
        begin = int(self.offsets[first])
        found = begin + np.flatnonzero(self.kept[begin : self.offsets[last]])
        skipped = start - int(self.row_offsets[first])
        return found[skipped : skipped + stop - start]

    def labels(self, places: Int[np.ndarray, " row"]) -> dict[str, Int[np.ndarray, " row"]]:
        """Return token_id, prompt_idx and pos of the tokens at some places, int32."""
        prompt_idx = np.searchsorted(self.offsets, places, "right") - 1
        return {
            "token_id": self.ids[places],
            "prompt_idx": prompt_idx.astype(np.int32),
            "pos": (places - self.offsets[prompt_idx]).astype(np.int32),
        }

    def row_arrays(self) -> dict[str, Int[np.ndarray, " row"]]:
        """Return token_id, prompt_idx and pos of every row, int32."""
        prompt_idx = np.repeat(np.arange(self.n_prompts, dtype=np.int32), self.lengths)
        pos = np.arange(len(self.ids), dtype=np.int64) - np.repeat(self.offsets[:-1], self.lengths)
        return {
            "token_id": self.ids[self.kept],
            "prompt_idx": prompt_idx[self.kept],
            "pos": pos[self.kept].astype(np.int32),
        }
