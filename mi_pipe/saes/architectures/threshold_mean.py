"""The threshold that stands for a batch's selection after training.

A batch keeps its largest activations; what is a fair rule for single rows afterwards is the smallest activation that
batches kept on average: m ← β m + (1 - β) min⁺ z over steps, divided by 1 - βᵗ so that the start at 0 does not pull it
down (Bussmann et al. 2024 without that division; peers that omit it choose too many features after short trainings).
"""

import torch
from jaxtyping import Float
from torch import Tensor

_LONGEST_MEMORY_STEPS = 100
_MEMORY_SHARE = 0.1


class ThresholdMean:
    """The bias-corrected running mean of the smallest activations kept."""

    def __init__(self, n_steps: int) -> None:
        """Remember about 100 steps, or a tenth of `n_steps` where that is less."""
        self._decay = 1 - 1 / max(1.0, min(_LONGEST_MEMORY_STEPS, _MEMORY_SHARE * n_steps))
        self._mean = torch.zeros((), dtype=torch.float64)
        self._n_observed = torch.zeros((), dtype=torch.int64)

    def observe(self, smallest: Float[Tensor, ""]) -> None:
        """Add the smallest activation of a batch; inf (nothing active) is left out."""
        value = float(smallest)
        if value != float("inf"):
            self._mean.mul_(self._decay).add_((1 - self._decay) * value)
            self._n_observed += 1

    @property
    def value(self) -> Float[Tensor, ""]:
        """The mean; 0 before the first step."""
        correction = 1 - self._decay ** int(self._n_observed)
        return (self._mean / correction if correction else self._mean).to(torch.float32)

    def state(self) -> dict[str, Tensor]:
        """Return the running mean and the number of steps in it."""
        return {"threshold_mean": self._mean, "threshold_steps": self._n_observed}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Go on from a checkpoint's state."""
        self._mean = state["threshold_mean"].clone()
        self._n_observed = state["threshold_steps"].clone()
