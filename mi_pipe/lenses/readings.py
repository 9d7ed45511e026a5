"""What a lens reads at one depth: figures of its next-token distribution, token by token.

With p the model's final distribution and q the lens's at the same token (nostalgebraist 2020; Belrose et al. 2023):
log-probability and rank of tokens of interest (rank 0 is the likeliest), entropy -Σ q log q, KL(p ‖ q) =
Σ p log(p/q) and the likeliest tokens. All in nats and float32, whatever the weights are.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Readings:
    """Figures of one lens at one depth."""

    log_prob: Float[Tensor, "batch pos choice"]
    """Of the tokens of interest."""
    rank: Int[Tensor, "batch pos choice"]
    """How many tokens are likelier than each of them."""
    entropy: Float[Tensor, "batch pos"]
    kl: Float[Tensor, "batch pos"]
    top_id: Int[Tensor, "batch pos top"]
    """The likeliest tokens, the likeliest first."""
    top_log_prob: Float[Tensor, "batch pos top"]


@torch.no_grad()
def read_lens(
    logits: Float[Tensor, "batch pos d_vocab"],
    final: Float[Tensor, "batch pos d_vocab"],
    choices: Int[Tensor, "batch pos choice"],
    n_top: int,
) -> Readings:
    """Return the figures of a lens's logits against the model's final log-probabilities `final` (float32)."""
    log_q = logits.float().log_softmax(-1)
    chosen = log_q.gather(-1, choices)
    # One choice at a time: all at once would be as many vocabularies.
    ranks = [(log_q > chosen[..., i, None]).sum(-1) for i in range(choices.shape[-1])]
    top = log_q.topk(min(n_top, log_q.shape[-1]), dim=-1)
    return Readings(
        log_prob=chosen,
        rank=torch.stack(ranks, dim=-1),
        entropy=-(log_q.exp() * log_q).sum(-1),
        kl=kl_divergence(final, log_q),
        top_id=top.indices,
        top_log_prob=top.values,
    )


def kl_divergence(
    final: Float[Tensor, "*batch d_vocab"], lens: Float[Tensor, "*batch d_vocab"]
) -> Float[Tensor, "*batch"]:
    """Return KL(p ‖ q) in nats from log-probabilities; tokens that p gives no probability count nothing.

    >>> half = torch.tensor([0.5, 0.5]).log()
    >>> round(float(kl_divergence(half, torch.tensor([0.25, 0.75]).log())), 4)
    0.1438
    """
    return torch.nn.functional.kl_div(lens, final, log_target=True, reduction="none").sum(-1)
