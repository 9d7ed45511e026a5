"""The copy score of the IOI paper: whether a head's OV circuit, fed a name, writes that name.

The state after the first block at the names of a prompt goes through a head's own input norm, W_V (with bias) and W_O,
then through the final norm and the unembedding; the score is the proportion of names that are among the five
likeliest tokens of their own. The negative score does the same with what the head writes turned around. (Wang et
al. 2022, "Interpretability in the Wild", section 3.1 and appendix; Easy-Transformer's `check_copy_circuit`, which takes
the second block's norm with the head's norm weights folded into W_V: the same thing.) Names are those at io, s1 and s2.
"""

from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mi_pipe.heads.final_readout import post_attention_norm
from mi_pipe.models.head_weights import HeadWeights, head_weights
from mi_pipe.models.model import Model

SCORES = ("name_copying", "negative_name_copying")
PLACES = ("io", "s1", "s2")
_TOP = 5
_CHUNK_LOGITS = 1 << 25
"""Logits held at once: 128 MiB in float32."""


@dataclass(frozen=True)
class Names:
    """States after the first block at names, and the names."""

    states: Float[Tensor, "name d_model"]
    tokens: Int[Tensor, " name"]


@torch.no_grad()
def read_names(model: Model, tokens: Int[Tensor, "pair pos"], places: Int[Tensor, "pair place"]) -> Names:
    """Run prompts and return the state after the first block at each place, pair by pair."""
    seen: list[Tensor] = []
    with model.edited({"blocks.0.hook_resid_post": lambda value: seen.append(value.detach())}):
        model.module(tokens.to(model.device))
    rows = torch.arange(len(tokens), device=model.device)[:, None]
    at, states = places.to(model.device), seen[0]
    return Names(states[rows, at].flatten(0, 1), tokens.to(model.device)[rows, at].flatten())


@torch.no_grad()
def name_copying(model: Model, layer: int, names: Names) -> Float[Tensor, "score head"]:
    """Return the two scores of SCORES of each head of a layer, float32."""
    weights = head_weights(model, layer)
    norm_name = f"blocks.{layer}.ln1.hook_in"
    norm = model.submodule(model.hooks[norm_name].module_path or "") if norm_name in model.hooks else nn.Identity()
    written = ov_output(weights, norm(names.states))
    post_norm = post_attention_norm(model, layer)
    if post_norm is not None:
        written = post_norm(written)
    step = max(1, _CHUNK_LOGITS // (model.info.d_vocab * weights.n_heads))
    found = [_is_copied(model, written[i : i + step], names.tokens[i : i + step]) for i in range(0, len(written), step)]
    return torch.cat(found, 1).float().mean(1)


def ov_output(weights: HeadWeights, normed: Float[Tensor, "name d_model"]) -> Float[Tensor, "name head d_model"]:
    """Return (x W_V + b_V) W_O of each head."""
    value = torch.einsum("nm,vmk->nvk", normed, weights.W_V)
    if weights.b_V is not None:
        value = value + weights.b_V
    by_head = rearrange(weights.to_heads(rearrange(value, "n v k -> v n k")), "h n k -> n h k")
    return torch.einsum("nhk,hkm->nhm", by_head, weights.W_O)


def _is_copied(
    model: Model, written: Float[Tensor, "name head d_model"], tokens: Int[Tensor, " name"]
) -> Bool[Tensor, "sign name head"]:
    """Say whether fewer than five tokens have a larger logit than the name, for what is written and for its negative.

    One product with the unembedding serves both: the norms' odd part changes sign, their bias does not.
    """
    above = model.final_norm(written)
    below = model.final_norm(-written)
    odd = nn.functional.linear((above - below) / 2, model.unembedding.weight)  # pyright: ignore[reportArgumentType]
    even = model.unembedding((above + below)[:1, :1] / 2)
    own = tokens[:, None, None].expand(-1, odd.shape[1], 1)
    ranks = [(logits > logits.gather(-1, own)).sum(-1) for logits in (even + odd, even - odd)]
    return torch.stack(ranks) < _TOP
