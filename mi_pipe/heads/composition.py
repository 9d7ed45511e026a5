"""Q-, K- and V-composition of all pairs of heads: how much of what one head writes a later one reads.

For an earlier head's A = W_V W_O and a later head's B, the score is ||A B||_F / (||A||_F ||B||_F) with B = W_Q W_K^T
(Q), its transpose (K), or W_V W_O (V). (Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits";
TransformerLens' `all_composition_scores`.) Only heads of later layers are scored.

No matrix of d_model x d_model is made. Every A and B is a product of a tall and a wide factor; a tall factor with QR
decomposition Q R has the norms of R, so with A = L1 L2 and B = M1 M2

    ||A B||_F = ||R(L1) (L2 M1) R(M2^T)^T||_F

where all but L2 and M1 are of d_head x d_head. L2 and M1 of all heads of two layers are multiplied at once.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from mi_pipe.models.head_weights import HeadWeights

Kind = Literal["q", "k", "v"]
KINDS: tuple[Kind, ...] = ("q", "k", "v")


@torch.no_grad()
def composition(layers: Sequence[HeadWeights], kind: Kind) -> Float[Tensor, "layer head later_layer later_head"]:
    """Return the score of each pair of heads, float32, NaN where the second head is not in a later layer."""
    n_layers, n_heads = len(layers), layers[0].n_heads
    scores = torch.full((n_layers, n_heads, n_layers, n_heads), torch.nan)
    written = [writing(weights) for weights in layers]
    for later in range(1, n_layers):
        read = reading(layers[later], kind)
        for earlier in range(later):
            scores[earlier, :, later] = pair_scores(written[earlier], read).cpu()
    return scores


def writing(weights: HeadWeights) -> Float[Tensor, "head d_head d_model"]:
    """Return R(W_V) W_O of each head over ||W_V W_O||_F, float32: it has the norms of the whole product."""
    root = weights.to_heads(_root(weights.W_V))
    return _unit(root @ weights.W_O.float())


def reading(weights: HeadWeights, kind: Kind) -> Float[Tensor, "head d_model d_head"]:
    """Return the reading factor of each head times the root of its other factor, of norm 1, float32."""
    if kind == "q":
        inner, outer = weights.W_Q, weights.to_heads(weights.W_K)
    elif kind == "k":
        inner, outer = weights.to_heads(weights.W_K), weights.W_Q
    else:
        inner, outer = weights.to_heads(weights.W_V), weights.W_O.mT
    return _unit(inner.float() @ _root(outer).mT)


def pair_scores(
    written: Float[Tensor, "earlier d_head d_model"], read: Float[Tensor, "later d_model d_head"]
) -> Float[Tensor, "earlier later"]:
    """Return the norm of each product."""
    rows = rearrange(written, "e k m -> (e k) m")
    columns = rearrange(read, "l m k -> m (l k)")
    squares = rearrange((rows @ columns).square(), "(e a) (l b) -> e l a b", e=len(written), l=len(read))
    return squares.sum((-1, -2)).sqrt()


@torch.no_grad()
def random_baseline(d_model: int, d_head: int, n_draws: int, seed: int) -> tuple[float, float]:
    """Return mean and standard deviation of the score of heads of these sizes with independent normal weights.

    The same for all three kinds, since every factor is then a random matrix of one shape. Subtracting it is the
    variant of the IOI paper's code (Wang et al. 2022).
    """
    generator = torch.Generator().manual_seed(seed)
    scores = torch.empty(n_draws)
    for i in range(n_draws):
        w_v, w_o, w_q, w_k = torch.randn(4, 1, d_model, d_head, generator=generator)
        scores[i] = pair_scores(_unit(_root(w_v) @ w_o.mT), _unit(w_q @ _root(w_k).mT)).item()
    return float(scores.mean()), float(scores.std(correction=0))


def _root(tall: Float[Tensor, "head d_model d_head"]) -> Float[Tensor, "head d_small d_head"]:
    """Return R of the QR decomposition: |tall x| = |R x| for every x."""
    return torch.linalg.qr(tall.float(), mode="r").R


def _unit(product: Tensor) -> Tensor:
    return product / product.norm(dim=(-1, -2), keepdim=True)
