"""What readers need of one hook point's stored rows, whoever wrote them."""

from typing import Protocol

import numpy as np
from jaxtyping import Int, Shaped

from mi_pipe.activations.layout import ArrayLayout


class RowArray(Protocol):
    """Rows (token, width) as they are stored; several threads may read at once.

    What cannot be read whole and unaltered raises ArtifactDamagedError.
    """

    layout: ArrayLayout
    n_rows: int

    def read(self, start: int, stop: int) -> Shaped[np.ndarray, "row width"]:
        """Return rows `start` to `stop` (exclusive); raises IndexError outside."""
        ...

    def read_into(self, out: Shaped[np.ndarray, "row width"], start: int) -> None:
        """Fill `out` (contiguous, of the stored dtype) with rows from `start` on; raises IndexError outside."""
        ...

    def take(self, rows: Int[np.ndarray, " row"]) -> Shaped[np.ndarray, "row width"]:
        """Return rows in any order, repeats allowed; raises IndexError outside."""
        ...
