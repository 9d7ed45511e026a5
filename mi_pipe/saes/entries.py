"""The active entries of a batch as a sparse or a dense code, and the products over them, whichever it is.

While few features are active, sums over entries are cheaper; once more than about one in `DENSE_SHARE` is, dense
products are (bench.sae_train). ReLU architectures can begin on one side and end on the other.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mi_pipe.saes import kernels
from mi_pipe.saes.code import SparseCode, above, n_true
from mi_pipe.saes.parameters import Parameters

DENSE_SHARE = 8
"""A code is dense if more than one in so many of its entries are active."""
_SAMPLE_ROWS = 128
"""Rows that tell which it is."""


@dataclass(frozen=True)
class DenseCode:
    """A code as a matrix, 0 where there is no entry."""

    values: Float[Tensor, "batch d_sae"]
    is_entry: Bool[Tensor, "batch d_sae"]

    def with_values(self, values: Float[Tensor, "batch d_sae"]) -> "DenseCode":
        """Return a code with the same entries and other values."""
        return DenseCode(torch.where(self.is_entry, values, 0.0), self.is_entry)

    def n_active(self) -> Tensor:
        """Return the number of entries above 0."""
        return torch.count_nonzero(self.values)

    def n_fired(self) -> Int[Tensor, " d_sae"]:
        """Return in how many rows each feature is above 0, int64."""
        return (self.values > 0).sum(0)


Code = SparseCode | DenseCode


def entries_above(pre: Float[Tensor, "batch d_sae"], bound: float | Float[Tensor, " d_sae"]) -> Code:
    """Return the entries of `pre` above a bound (one number or one a feature), with their values."""
    sample = above(pre[:: max(1, pre.shape[0] // _SAMPLE_ROWS)], bound)
    if n_true(sample) * DENSE_SHARE <= sample.numel():
        return SparseCode.above(pre, bound)
    is_entry = above(pre, bound)
    return DenseCode(torch.where(is_entry, pre, 0.0), is_entry)


def of_feature(code: Code, per_feature: Float[Tensor, " d_sae"]) -> Tensor:
    """Return for each entry its feature's number, in a shape that goes with `code.values`."""
    return per_feature if isinstance(code, DenseCode) else per_feature[code.features]


def decode(code: Code, W_dec: Float[Tensor, "d_sae d_out"]) -> Float[Tensor, "batch d_out"]:  # noqa: N803
    """Return Σ_j z_j W_dec,j for each row, without bias."""
    return code.values @ W_dec if isinstance(code, DenseCode) else kernels.decode(code, W_dec)


def products_at(code: Code, rows: Float[Tensor, "batch d"], features: Float[Tensor, "d_sae d"]) -> Tensor:
    """Return rows[b] · features[j] at each entry (b, j), in the shape of `code.values`; 0 at no entry."""
    if isinstance(code, DenseCode):
        return torch.where(code.is_entry, rows @ features.T, 0.0)
    return kernels.products_at(code, rows, features)


def sums_by_feature(code: Code, weights: Tensor) -> Float[Tensor, " d_sae"]:
    """Return for each feature the sum of a weight over its entries."""
    if isinstance(code, DenseCode):
        return weights.sum(0)
    return torch.zeros(code.d_sae, dtype=weights.dtype, device=weights.device).index_add_(0, code.features, weights)


def backward(
    params: Parameters,
    code: Code,
    delta: Tensor,
    inputs: Float[Tensor, "batch d_in"],
    grad_output: Float[Tensor, "batch d_out"],
    decoder_bias: bool = True,
) -> Parameters:
    """Return the gradients of weights and biases for one use of a code.

    With u the encoder's inputs (x - b_dec or x), pre = W_enc u + b_enc, z = `code.values`, x̂ = W_decᵀ z + b_dec and
    g = `grad_output` = ∂loss/∂x̂: ∂W_dec,j = Σ_b z_bj g_b, ∂W_enc,j = Σ_b δ_bj u_b, ∂b_enc,j = Σ_b δ_bj,
    ∂b_dec = Σ_b g_b - Σ_j ∂b_enc,j W_enc,j, where δ = ∂loss/∂pre is given by entry as `delta`. Without `decoder_bias`
    the output was decoded without b_dec (AuxK), which then gets a gradient through the encoder alone.
    """
    b_enc = sums_by_feature(code, delta)
    b_dec = grad_output.sum(0) if decoder_bias else torch.zeros_like(params.b_dec)
    if params.subtract_b_dec:
        b_dec -= b_enc @ params.W_enc
    if isinstance(code, DenseCode):
        W_enc, W_dec = delta.T @ inputs, code.values.T @ grad_output  # noqa: N806
    else:
        order = code.by_feature()
        W_enc = kernels.sum_by_feature(order, delta, inputs)  # noqa: N806
        W_dec = kernels.sum_by_feature(order, code.values, grad_output)  # noqa: N806
    return Parameters(W_enc, W_dec, b_enc, b_dec, subtract_b_dec=params.subtract_b_dec)
