"""The QK fix of AtP*: queries and keys by a recomputed softmax (Kramár et al. 2024, section 3.1.1, eq. 7).

A replaced query or key changes the pattern A through a softmax that may be saturated, where the gradient says nothing.
So only what follows the pattern is linearised:

    I(n) = sum over the entries it changes of (A(n replaced) - A(base)) . dm/dA,   dm/dA[t, s] = dm/dz[t] . v[s]

A query changes one row of the pattern. A key changes one score in each row t at or after its position s: its share of
the row goes from p to p', and all others keep their proportions, so that what the head reads changes by

    (p' - p) / (1 - p) (v[s] - z[t])          p' = sigmoid(new score - log of the sum of exp over the other keys)

which needs memory T^2 for all keys together, as their Algorithm 4. Where p is near 1, 1 - p is lost to rounding; that
can be the case of a row's largest key only, for which the same is computed with that key left out of the softmax. A
shared key changes the pattern of every head of its group, and its effect is the sum over them.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mi_pipe.attribution.attention_calls import AttentionCall
from mi_pipe.patching.readout import wide

_UNSEEN = -1e30
"""Masks are minus infinity or about the lowest number; bfloat16's and float16's too."""


@dataclass(frozen=True)
class PatternChange:
    """What replacing each query, or each key, of one layer does to what the heads read."""

    query: Float[Tensor, "batch head pos d_head"]
    """Change of z at the query's own position."""
    key: Float[Tensor, "batch head query key"]
    """What part of the way z goes from where it is to v of the key; 0 at each row's largest key."""
    largest: Int[Tensor, "batch head query 1"]
    """Each row's largest key."""
    by_largest: Float[Tensor, "batch head query d_head"]
    """Change of z when the row's largest key is replaced."""
    v: Float[Tensor, "batch head pos d_head"]
    z: Float[Tensor, "batch head pos d_head"]
    group: int

    def query_effects(self, gradient: Float[Tensor, "batch head pos d_head"]) -> Float[Tensor, "batch head pos"]:
        """Return the effect of each query, given dm/dz."""
        return (self.query * gradient).sum(-1)

    def key_effects(self, gradient: Float[Tensor, "batch head pos d_head"]) -> Float[Tensor, "batch kv_head pos"]:
        """Return the effect of each key, given dm/dz: summed over later queries and the heads that share it."""
        effects = self.key * (gradient @ self.v.mT - (gradient * self.z).sum(-1, keepdim=True))
        effects = effects.scatter_add(-1, self.largest, (self.by_largest * gradient).sum(-1, keepdim=True))
        return effects.sum(-2).unflatten(1, (-1, self.group)).sum(2)


@torch.no_grad()
def pattern_change(base: AttentionCall, donor: AttentionCall) -> PatternChange:
    """Return what each of the donor run's queries and keys, alone in the base run, does to what the heads read."""
    q, k, v = wide(base.q), wide(base.for_heads(base.k)), wide(base.for_heads(base.v))
    old = base.masked(base.scores(q, k))
    new = base.masked(base.scores(q, wide(base.for_heads(donor.k))))
    pattern = old.softmax(-1)
    z = pattern @ v
    query = base.masked(base.scores(wide(donor.q), k)).softmax(-1) @ v - z
    share, largest = pattern.max(-1, keepdim=True)
    others = old.logsumexp(-1, keepdim=True) + torch.log1p(-pattern)
    key = ((torch.sigmoid(new - others) - pattern) / (1 - pattern)).scatter(-1, largest, 0.0)
    without = old.scatter(-1, largest, -torch.inf)
    # A query that sees one key only gives it all its attention whatever the score: no change, though 0 times NaN.
    now = torch.sigmoid(new.gather(-1, largest) - without.logsumexp(-1, keepdim=True))
    by_largest = (now - share) * (v.take_along_dim(largest, 2) - without.softmax(-1) @ v)
    sees_more = (now != share) & (without > _UNSEEN).any(-1, keepdim=True)
    return PatternChange(query, key, largest, torch.where(sees_more, by_largest, 0.0), v, z, base.group)
