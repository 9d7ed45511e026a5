"""BatchTopK: z keeps the k * batch largest of ReLU(pre) over a whole batch; a threshold replaces that afterwards.

Bussmann, Leask and Nanda, "BatchTopK sparse autoencoders", 2024. After training z_j = pre_j [pre_j > θ], where
θ estimates the smallest activation that training kept: the running mean m ← β m + (1 - β) min⁺ z over steps,
divided by 1 - βᵗ so that the start at 0 does not pull it down.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from mi_pipe.saes.architecture import InferenceRule
from mi_pipe.saes.code import SparseCode
from mi_pipe.saes.kernels import top_k_flat

_LONGEST_MEMORY_STEPS = 100
_MEMORY_SHARE = 0.1


class BatchTopK:
    """Keeps k features a row on average."""

    def __init__(self, k: int, n_steps: int) -> None:
        """Keep `k` a row; the threshold remembers about 100 steps, or a tenth of `n_steps` where that is less."""
        self.k = k
        self._decay = 1 - 1 / max(1.0, min(_LONGEST_MEMORY_STEPS, _MEMORY_SHARE * n_steps))
        self._mean = torch.zeros((), dtype=torch.float64)
        self._n_observed = torch.zeros((), dtype=torch.int64)

    def select(self, pre: Float[Tensor, "batch d_sae"]) -> SparseCode:
        """Return the k * batch largest positive values of the batch."""
        n_rows, d_sae = pre.shape
        positions, values = top_k_flat(pre, self.k * n_rows)
        counts = torch.bincount(positions // d_sae, minlength=n_rows)
        starts = torch.zeros(n_rows + 1, dtype=torch.int32, device=pre.device)
        starts[1:] = counts.cumsum(0)
        return SparseCode(starts, (positions % d_sae).to(torch.int32), values, d_sae)

    def observe(self, code: SparseCode) -> None:
        """Add the smallest positive activation to the running mean."""
        active = code.values[code.values > 0]
        if active.shape[0] == 0:
            return
        self._mean.mul_(self._decay).add_((1 - self._decay) * float(active.min()))
        self._n_observed += 1

    @property
    def threshold(self) -> Float[Tensor, ""]:
        """The bias-corrected running mean; 0 before the first step."""
        correction = 1 - self._decay ** int(self._n_observed)
        return (self._mean / correction if correction else self._mean).to(torch.float32)

    def state(self) -> dict[str, Tensor]:
        """Return the running mean and the number of steps in it."""
        return {"threshold_mean": self._mean, "threshold_steps": self._n_observed}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Go on from a checkpoint's state."""
        self._mean = state["threshold_mean"].clone()
        self._n_observed = state["threshold_steps"].clone()

    def rule(self) -> InferenceRule:
        """Keep what exceeds the threshold."""
        return InferenceRule("threshold", k=self.k, threshold=self.threshold)
