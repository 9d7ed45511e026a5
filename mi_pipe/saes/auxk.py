"""AuxK: an auxiliary loss that lets dead features explain what the living leave over.

Gao et al. 2024, appendix A.2. With e = x - x̂ held constant, and D the features that have not fired for a window of
tokens: ẑ = ReLU(TopK_{k_aux}(pre_D)), k_aux = min(d_in / 2, |D|), ê = W_decᵀ ẑ (no bias, since e has none left),
loss = coefficient * Σ‖e - ê‖² / Σ‖e - ē‖², ē the batch mean of e. Zero where nothing is dead.

Known slips, each tested against: gradients through e reach the living features; ê with b_dec counts the bias twice.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mi_pipe.saes.code import SparseCode
from mi_pipe.saes.gradients import Parameters, code_gradients
from mi_pipe.saes.kernels import decode, top_k_rows

_LARGEST_SHARE_OF_BUDGET = 0.1


@dataclass(frozen=True)
class AuxLoss:
    """The auxiliary loss, its coefficient included, and its gradients."""

    loss: Float[Tensor, ""]
    gradients: Parameters


def dead_window(n_tokens: int, longest: int) -> int:
    """Return after how many tokens without firing a feature is dead: `longest`, or a tenth of the budget if smaller."""
    return max(1, min(longest, int(_LARGEST_SHARE_OF_BUDGET * n_tokens)))


def auxk(
    params: Parameters,
    pre: Float[Tensor, "batch d_sae"],
    dead: Int[Tensor, " dead"],
    inputs: Float[Tensor, "batch d_in"],
    error: Float[Tensor, "batch d_in"],
    coefficient: float,
) -> AuxLoss:
    """Return AuxK for the features listed in `dead` (at least one).

    `inputs` are x - b_dec, `error` is x - x̂, taken as a constant.
    """
    k_aux = min(error.shape[1] // 2 or 1, dead.shape[0])
    values, places = top_k_rows(pre[:, dead], k_aux)
    code = SparseCode.from_rows(dead[places], values.relu_(), pre.shape[1])
    missing = decode(code, params.W_dec) - error
    variance = (error - error.mean(0)).square().sum()
    scale = torch.where(variance > 0, coefficient / variance, 0.0)
    gradients = code_gradients(params, code, inputs, missing * (2 * scale), decoder_bias=False)
    return AuxLoss(scale * missing.square().sum(), gradients)
