"""From what a head writes to logits: a norm on attention's output, the final norm, and the unembedding.

A norm (LayerNorm, RMSNorm or none) is norm(x) = w * C x / sigma(x) + b, with C the centring of a LayerNorm. For
a given x all but sigma is known from the weights, and sigma is measured by calling the norm itself, so
every architecture's own norm counts as it is. A soft cap or scale that a model applies to its logits afterwards is
not part of this.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mi_pipe.features.logit_effects import FoldedNorm, fold_norm
from mi_pipe.models.model import Model


@dataclass(frozen=True)
class MeasuredNorm:
    """A normalisation on given values: linear in them once its scale is held."""

    folded: FoldedNorm
    inverse_scale: Float[Tensor, "row 1"]
    """1 / sigma of each value."""
    bias: Float[Tensor, "row d_model"]
    """What the norm adds whatever the value is; the same in every row."""

    def transposed(self, directions: Float[Tensor, "row d_model"]) -> Float[Tensor, "row d_model"]:
        """Return d with <d, x> = <direction, norm(x) - bias> for each row: C (w * direction) / sigma."""
        return seen_through(self.folded, directions) * self.inverse_scale


def seen_through(norm: FoldedNorm, directions: Float[Tensor, "*row d_model"]) -> Float[Tensor, "*row d_model"]:
    """Return C (w * direction): what a direction behind a norm reads before it, up to the norm's scale."""
    weighted = directions * norm.weight.to(directions)
    return weighted - weighted.mean(-1, keepdim=True) if norm.is_centred else weighted


def post_attention_norm(model: Model, layer: int) -> nn.Module | None:
    """Return the norm on the attention's output before it is added to the residual stream (Gemma 2 and 3), or None."""
    name = f"blocks.{layer}.ln1_post.hook_in"
    return model.submodule(model.hooks[name].module_path or "") if name in model.hooks else None


@torch.no_grad()
def measure_norm(norm: nn.Module, values: Float[Tensor, "row d_model"]) -> MeasuredNorm:
    """Return the norm as it acts on each of `values`; raises ModelError if it is no LayerNorm, RMSNorm or identity.

    The odd part (norm(x) - norm(-x)) / 2 is w * C x / sigma, so 1 / sigma is its ratio to w * C x.
    """
    folded = fold_norm(norm, values.shape[-1], values[:1])
    above = norm(values)
    odd = (above - norm(-values)) / 2
    unscaled = folded.apply(values.to(folded.weight)).to(odd)
    inverse = (odd * unscaled).sum(-1, keepdim=True) / unscaled.square().sum(-1, keepdim=True).clamp_min(1e-30)
    return MeasuredNorm(folded, inverse, above - odd)


def token_directions(model: Model, tokens: Int[Tensor, "*row"]) -> Float[Tensor, "*row d_model"]:
    """Return W_U's column of each token, at least float32."""
    columns = model.unembedding.weight
    assert isinstance(columns, Tensor), "an unembedding has a weight matrix (d_vocab, d_model)"
    chosen = columns[tokens]
    return chosen.to(torch.promote_types(chosen.dtype, torch.float32))


def token_biases(model: Model, tokens: Int[Tensor, "*row"]) -> Float[Tensor, "*row"]:
    """Return the unembedding's bias of each token, 0 where it has none."""
    bias = getattr(model.unembedding, "bias", None)
    if isinstance(bias, Tensor):
        return bias[tokens].to(torch.promote_types(bias.dtype, torch.float32))
    return torch.zeros(tokens.shape, device=tokens.device)
