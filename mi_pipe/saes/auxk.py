"""AuxK: an auxiliary loss that lets dead features explain what the living leave over.

Gao et al., "Scaling and evaluating sparse autoencoders", 2024, appendix A.2. With e = x - x̂ held constant, and D the
features that have not fired for a window of tokens: ẑ = ReLU(TopK_{k_aux}(pre_D)), k_aux = min(d_out / 2, |D|),
ê = W_decᵀ ẑ (no bias, since e has none left), loss = coefficient * Σ‖e - ê‖² / Σ‖e - ē‖², ē the batch mean of e. Zero
where nothing is dead.

Known slips, each tested against: gradients through e reach the living features; ê with b_dec counts the bias twice.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mi_pipe.saes.code import SparseCode
from mi_pipe.saes.entries import backward
from mi_pipe.saes.kernels import decode, products_at
from mi_pipe.saes.parameters import Parameters
from mi_pipe.saes.selection import top_k_rows

_LARGEST_SHARE_OF_BUDGET = 0.1


@dataclass(frozen=True)
class AuxLoss:
    """The auxiliary loss, its coefficient included, and its gradients."""

    loss: Float[Tensor, ""]
    gradients: Parameters


def dead_window(n_tokens: int, longest: int) -> int:
    """Return after how many tokens without firing a feature is dead: `longest`, or a tenth of the budget if smaller."""
    return max(1, min(longest, int(_LARGEST_SHARE_OF_BUDGET * n_tokens)))


class AuxK:
    """AuxK of one batch, whose pre-activations come in chunks of rows."""

    def __init__(self, dead: Int[Tensor, " dead"], d_out: int, coefficient: float) -> None:
        """Take the features listed in `dead`; none, or a coefficient of 0, means no loss."""
        self._dead = dead
        self._n_kept = min(d_out // 2 or 1, dead.shape[0])
        self._coefficient = coefficient
        self._parts: list[tuple[Tensor, Tensor]] = []

    def add(self, pre: Float[Tensor, "chunk d_sae"]) -> None:
        """Look at the next rows."""
        if self._n_kept and self._coefficient:
            values, places = top_k_rows(pre[:, self._dead], self._n_kept)
            self._parts.append((self._dead[places], values.relu_()))

    @property
    def is_idle(self) -> bool:
        """Whether there is no loss: nothing is dead, or nothing was asked for."""
        return not self._parts

    def loss(
        self, params: Parameters, inputs: Float[Tensor, "batch d_in"], error: Float[Tensor, "batch d_out"]
    ) -> AuxLoss | None:
        """Return the loss; `inputs` are those of the encoder, `error` is x - x̂, taken as a constant."""
        if not self._parts:
            return None
        features, values = (torch.cat(part) for part in zip(*self._parts, strict=True))
        code = SparseCode.from_rows(features, values, params.d_sae)
        missing = decode(code, params.W_dec) - error
        variance = (error - error.mean(0)).square().sum()
        scale = torch.where(variance > 0, self._coefficient / variance, 0.0)
        grad = missing * (2 * scale)
        delta = products_at(code, grad, params.W_dec) * (code.values > 0)
        gradients = backward(params, code, delta, inputs, grad, decoder_bias=False)
        return AuxLoss(scale * missing.square().sum(), gradients)
