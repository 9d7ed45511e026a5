"""The k largest of a stream of values: exactly the head of a full sort, from blocks in any order.

Order: value descending, row ascending where values are equal; NaN is never among them. Held are the k best so far and a
block.
"""

import numpy as np
from jaxtyping import Float, Int


class Strongest:
    """The k largest values so far, with their rows; at most one a prompt if `prompt_of_row` is given."""

    def __init__(self, k: int, prompt_of_row: Int[np.ndarray, " row"] | None = None) -> None:
        """Begin with none."""
        self._k = k
        self._prompt_of_row = prompt_of_row
        self.rows: Int[np.ndarray, " kept"] = np.empty(0, np.int64)
        self.values: Float[np.ndarray, " kept"] = np.empty(0, np.float32)

    def add(self, rows: Int[np.ndarray, " row"], values: Float[np.ndarray, " row"]) -> None:
        """Look at a block."""
        is_candidate = ~np.isnan(values)
        if len(self.values) == self._k:
            is_candidate &= values >= self.values[-1]
        rows = np.concatenate([self.rows, rows[is_candidate]])
        values = np.concatenate([self.values, values[is_candidate]])
        order = np.lexsort((rows, -values))
        if self._prompt_of_row is not None:
            prompts = self._prompt_of_row[rows[order]]
            order = order[np.sort(np.unique(prompts, return_index=True)[1])]
        self.rows, self.values = rows[order[: self._k]], values[order[: self._k]]
