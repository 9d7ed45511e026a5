"""Sums over a data set from which metrics are made: never means of batch means.

FVU = Σ‖x - x̂‖² / Σ‖x - x̄‖², both over the same whole set, x̄ that set's mean. L0 = active features / rows.
"""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor


def wide_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype of sums over a data set: float64 where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


class Moments:
    """Running count, sum and sum of squared norms of rows."""

    def __init__(self, width: int, device: torch.device) -> None:
        """Start empty, for rows of `width` numbers."""
        self._dtype = wide_dtype(device)
        self.n_rows = 0
        self._sum = torch.zeros(width, dtype=self._dtype, device=device)
        self._square = torch.zeros((), dtype=self._dtype, device=device)

    def update(self, x: Float[Tensor, "batch d_in"]) -> None:
        """Add the rows of a batch."""
        self.n_rows += x.shape[0]
        self._sum += x.sum(0)
        self._square += torch.linalg.vector_norm(x).to(self._dtype).square()

    def state(self) -> dict[str, Tensor]:
        """Return what it takes to go on."""
        return {"n_rows": torch.tensor(self.n_rows), "sum": self._sum, "square": self._square}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from saved sums."""
        self.n_rows = int(state["n_rows"])
        self._sum.copy_(state["sum"])
        self._square.copy_(state["square"])

    def centred_square(self) -> Float[Tensor, ""]:
        """Return Σ‖x - x̄‖² over all rows so far."""
        return self._square - self._sum.square().sum() / max(self.n_rows, 1)


class StreamingFVU:
    """Fraction of variance unexplained over a whole set, batch by batch.

    >>> fvu = StreamingFVU(1, torch.device("cpu"))
    >>> fvu.update(torch.tensor([[1.0], [2.0]]), torch.tensor([[1.0], [2.5]]))
    >>> fvu.update(torch.tensor([[3.0]]), torch.tensor([[3.5]]))
    >>> round(fvu.value(), 6)
    0.25
    """

    def __init__(self, width: int, device: torch.device) -> None:
        """Start empty."""
        self._moments = Moments(width, device)
        self._error = torch.zeros((), dtype=wide_dtype(device), device=device)

    def update(self, x: Float[Tensor, "batch d_in"], reconstruction: Float[Tensor, "batch d_in"]) -> None:
        """Add a batch and its reconstruction."""
        dtype = wide_dtype(x.device)
        self._moments.update(x.to(dtype))
        self._error += (x.to(dtype) - reconstruction).square().sum()

    def value(self) -> float:
        """Return the FVU of all rows so far; NaN if they do not vary."""
        return float(self._error / self._moments.centred_square())
