"""Running a model on random tokens written twice: scores of its heads, and its loss on either half.

A model that does induction predicts the second copy nearly without loss.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mi_pipe.attention.diagonals import SCORES, pattern_scores
from mi_pipe.attention.watching import watch_patterns
from mi_pipe.core.vocabulary import Vocabulary
from mi_pipe.models.info import ModelInfo
from mi_pipe.models.model import Model
from mi_pipe.prompts.repeated import ordinary_tokens, repeated_tokens

_COPIES = 2


@dataclass(frozen=True)
class RepeatResults:
    """What a batch of sequences gave, sequence by sequence."""

    scores: Float[np.ndarray, "sequence layer head score"]
    losses: Float[np.ndarray, "sequence half"]
    """Mean loss, in nats, on each copy's tokens but its first."""


def fitting_period(period: int, vocabulary: Vocabulary, info: ModelInfo) -> int:
    """Return the period, or the longest that the context and the vocabulary of the model allow."""
    return min(period, info.n_ctx // _COPIES, len(_tokens(vocabulary, info)))


def repeated_sequences(
    vocabulary: Vocabulary, info: ModelInfo, n_sequences: int, period: int, seed: int
) -> Int[Tensor, "sequence pos"]:
    """Return sequences of `period` distinct random ordinary tokens written twice, without BOS, int64."""
    rng = np.random.default_rng(seed)
    rows = repeated_tokens(rng, _tokens(vocabulary, info), _COPIES * period, [period] * n_sequences)
    return torch.from_numpy(rows.astype(np.int64))


def measure_repeats(model: Model, tokens: Int[Tensor, "sequence pos"], period: int) -> RepeatResults:
    """Run sequences of one batch and score every head on each."""
    info = model.info
    scores = np.zeros((len(tokens), info.n_layers, info.n_heads, len(SCORES)))

    def score(layer: int, pattern: Float[Tensor, "batch head query key"]) -> None:
        scores[:, layer] = pattern_scores(pattern, period).cpu().numpy()

    logits = watch_patterns(model, tokens, score)
    return RepeatResults(scores, half_losses(logits, tokens.to(logits.device), period).cpu().numpy())


def half_losses(
    logits: Float[Tensor, "batch pos d_vocab"], tokens: Int[Tensor, "batch pos"], period: int
) -> Float[Tensor, "batch half"]:
    """Return the mean cross-entropy, in nats, of tokens 1..n-1 and n+1..2n-1 (n the period), float64.

    The first token of either copy is left out: nothing before it says what it is.
    """
    losses = torch.nn.functional.cross_entropy(
        logits[:, :-1].float().transpose(1, 2), tokens[:, 1:], reduction="none"
    ).double()
    return torch.stack([losses[:, : period - 1].mean(1), losses[:, period:].mean(1)], dim=1)


def _tokens(vocabulary: Vocabulary, info: ModelInfo) -> Int[np.ndarray, " token"]:
    ordinary = ordinary_tokens(vocabulary)
    return ordinary[ordinary < info.d_vocab]
