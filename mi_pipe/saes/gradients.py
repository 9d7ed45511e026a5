"""Gradients of a sparse autoencoder's parameters from its sparse code, without autograd.

With u = x - b_dec, pre = W_enc u + b_enc, z = ReLU(pre) at the selected entries, x̂ = W_decᵀ z + b_dec and
g = ∂loss/∂x̂ (a row a sample):

∂W_dec,j = Σ_b z_bj g_b,   δ_bj = (g_b · W_dec,j) [z_bj > 0],   ∂W_enc,j = Σ_b δ_bj u_b,   ∂b_enc,j = Σ_b δ_bj,
∂b_dec = Σ_b g_b - Σ_j ∂b_enc,j W_enc,j.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mi_pipe.saes.code import SparseCode
from mi_pipe.saes.kernels import products_at, sum_by_feature


@dataclass
class Parameters:
    """Trained tensors in the normalised space, one row a feature in both matrices."""

    W_enc: Float[Tensor, "d_sae d_in"]
    W_dec: Float[Tensor, "d_sae d_in"]
    b_enc: Float[Tensor, " d_sae"]
    b_dec: Float[Tensor, " d_in"]

    @property
    def device(self) -> torch.device:
        """Device of the tensors."""
        return self.W_enc.device

    def to(self, device: torch.device) -> "Parameters":
        """Return the tensors on another device (the same ones if they are there)."""
        return Parameters(**{name: value.to(device) for name, value in self.named().items()})

    def named(self) -> dict[str, Tensor]:
        """Return the tensors by name."""
        return {"W_enc": self.W_enc, "W_dec": self.W_dec, "b_enc": self.b_enc, "b_dec": self.b_dec}


def code_gradients(
    params: Parameters,
    code: SparseCode,
    inputs: Float[Tensor, "batch d_in"],
    grad_output: Float[Tensor, "batch d_in"],
    decoder_bias: bool = True,
) -> Parameters:
    """Return the gradients of all parameters for one use of the code.

    `inputs` are the encoder's inputs x - b_dec. Without `decoder_bias` the output was decoded without b_dec
    (AuxK), which then gets a gradient through the encoder alone.
    """
    order = code.by_feature()
    delta = products_at(code, grad_output, params.W_dec) * (code.values > 0)
    b_enc = torch.zeros_like(params.b_enc).index_add_(0, code.features, delta)
    b_dec = -(b_enc @ params.W_enc)
    if decoder_bias:
        b_dec += grad_output.sum(0)
    return Parameters(
        W_enc=sum_by_feature(order, delta, inputs),
        W_dec=sum_by_feature(order, code.values, grad_output),
        b_enc=b_enc,
        b_dec=b_dec,
    )
