"""Prefix matching and copying of every head on random tokens written four times.

Sequences are 25 random tokens repeated four times, the 4% most and least common tokens left out, 10 of them (Olsson et
al. 2022, "In-context Learning and Induction Heads", head activation evaluators; Bansal et al. 2022, arXiv 2212.09095,
algorithms 1 and 2). How common a token is, is not known here: its number stands for it, since byte-pair tokenizers
number tokens in the order in which they merged them. Tokens of a block are distinct.

- prefix matching: for each token in repeats 2 to 4, the attention to all tokens that followed earlier occurrences of
  it, summed; mean over these positions. 1 is a perfect induction head, uniform attention is near 0.04.
- copying: what the head writes at a position is read off as logits of the tokens that it could attend to (the block's
  tokens up to there); raised = ReLU(logit - their mean); share = raised[the token it attends to most] / sum(raised);
  mean over all positions but the first; scaled from [0, 1] to [-1, 1]. The final norm's scale does not enter this
  share and its bias is no head's: only its linear part counts. A head that rests on the first token is not copying.
"""

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mi_pipe.attention.watching import watch_patterns
from mi_pipe.core.vocabulary import Vocabulary
from mi_pipe.features.logit_effects import fold_norm
from mi_pipe.heads.final_readout import post_attention_norm, seen_through, token_directions
from mi_pipe.models.head_weights import head_weights
from mi_pipe.models.info import ModelInfo
from mi_pipe.models.model import Model
from mi_pipe.prompts.repeated import ordinary_tokens, repeated_tokens

REPEATS = 4
_EXCLUDED = 0.04
SCORES = ("prefix_matching", "sequence_copying")


@dataclass(frozen=True)
class Sequences:
    """Random blocks written four times."""

    tokens: Int[Tensor, "sequence pos"]
    period: int


def random_sequences(vocabulary: Vocabulary, info: ModelInfo, n_sequences: int, period: int, seed: int) -> Sequences:
    """Return sequences of `period` tokens (fewer where context or vocabulary is too small) four times, without BOS."""
    ordinary = ordinary_tokens(vocabulary)
    ordinary = ordinary[ordinary < info.d_vocab]
    n_excluded = int(_EXCLUDED * len(ordinary))
    kept = ordinary[n_excluded : len(ordinary) - n_excluded]
    fitting = min(period, info.n_ctx // REPEATS, len(kept))
    rows = repeated_tokens(np.random.default_rng(seed), kept, REPEATS * fitting, [fitting] * n_sequences)
    return Sequences(torch.from_numpy(rows.astype(np.int64)), fitting)


def measure_random(model: Model, sequences: Sequences) -> Float[np.ndarray, "sequence layer head score"]:
    """Run sequences of one batch and return the scores of SCORES, float64; one layer's values at a time."""
    info, period = model.info, sequences.period
    tokens = sequences.tokens.to(model.device)
    scores = np.zeros((len(tokens), info.n_layers, info.n_heads, len(SCORES)))
    written: dict[int, Tensor] = {}
    attended: dict[int, Tensor] = {}
    norm = fold_norm(model.final_norm, info.d_model, torch.empty(0, dtype=model.dtype, device=model.device))
    read = seen_through(norm, token_directions(model, tokens[:, :period]))

    def keep(z: Tensor, layer: int) -> None:
        written[layer] = z.detach().reshape(*tokens.shape, info.n_heads, info.d_head)

    def score(layer: int, pattern: Float[Tensor, "batch head query key"]) -> None:
        scores[:, layer, :, 0] = prefix_matching(pattern, period).cpu().numpy()
        attended[layer] = pattern.argmax(-1) % period

    watch_patterns(
        model, tokens, score, {f"blocks.{i}.attn.hook_z": partial(keep, layer=i) for i in range(info.n_layers)}
    )
    for layer in range(info.n_layers):
        logits = _head_logits(model, layer, written[layer], read)
        scores[:, layer, :, 1] = copying(logits, attended[layer]).cpu().numpy()
    return scores


def prefix_matching(pattern: Float[Tensor, "batch head query key"], period: int) -> Float[Tensor, "batch head"]:
    """Return the mean attention from repeats 2 and on to what followed earlier occurrences of the token, float64."""
    n_pos = pattern.shape[-1]
    query, key = torch.meshgrid(torch.arange(n_pos), torch.arange(n_pos), indexing="ij")
    back = query - (key - 1)
    followed_it = (back > 0) & (back % period == 0) & (key > 0)
    found = (pattern.double() * followed_it.to(pattern.device)).sum(-1)
    return found[:, :, period:].mean(-1)


def copying(
    logits: Float[Tensor, "batch head pos token"], attended: Int[Tensor, "batch head pos"]
) -> Float[Tensor, "batch head"]:
    """Return the mean share of raised logits that the most attended token has, scaled to [-1, 1], float64.

    Token j of a block first stands at position j and is attendable from there on. Where no logit is raised the share
    is 0.
    """
    n_pos, n_tokens = logits.shape[-2:]
    attendable = torch.ones(n_pos, n_tokens, dtype=torch.bool, device=logits.device).tril()
    exact = logits.double().masked_fill(~attendable, 0.0)
    mean = exact.sum(-1, keepdim=True) / attendable.sum(-1, keepdim=True)
    raised = (exact - mean).clamp_min(0.0).masked_fill(~attendable, 0.0)
    share = raised.gather(-1, attended[..., None]).squeeze(-1) / raised.sum(-1).clamp_min(1e-30)
    return 2 * share[:, :, 1:].mean(-1) - 1


def _head_logits(
    model: Model, layer: int, z: Float[Tensor, "batch pos head d_head"], read: Float[Tensor, "batch token d_model"]
) -> Float[Tensor, "batch head pos token"]:
    """Return the logits of what each head writes, up to a positive scale."""
    post_norm = post_attention_norm(model, layer)
    if post_norm is not None:
        read = seen_through(fold_norm(post_norm, model.info.d_model, z.new_empty(0)), read)
    by_token = torch.einsum("hkm,btm->bhkt", head_weights(model, layer).W_O.to(read), read)
    return torch.einsum("bphk,bhkt->bhpt", z.to(read), by_token)
