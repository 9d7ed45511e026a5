"""Head weights with their input norm folded in: what a head reads of the residual stream, rather than of the norm.

With norm(x) = w * C x / sigma + b, a head's query is W_Q^T (w * C x) / sigma and a constant, so the folded weights are
C (w * W) (TransformerLens' `fold_layer_norm`). The output is not centred and biases stay as they are.
"""

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from mi_pipe.features.logit_effects import FoldedNorm, fold_norm
from mi_pipe.heads.final_readout import seen_through
from mi_pipe.models.head_weights import HeadWeights, head_weights
from mi_pipe.models.model import Model


@torch.no_grad()
def folded_weights(model: Model, layer: int) -> HeadWeights:
    """Return a layer's weights with its input norm folded in; as they are where it has none."""
    weights = head_weights(model, layer)
    name = f"blocks.{layer}.ln1.hook_in"
    if name not in model.hooks:
        return weights
    norm = fold_norm(model.submodule(model.hooks[name].module_path or ""), model.info.d_model, weights.W_Q.new_empty(0))
    return replace(weights, **{part: _fold(norm, getattr(weights, part)) for part in ("W_Q", "W_K", "W_V")})


def _fold(norm: FoldedNorm, weight: Float[Tensor, "head d_model d_head"]) -> Float[Tensor, "head d_model d_head"]:
    return seen_through(norm, weight.mT).mT
