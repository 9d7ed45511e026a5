"""Prompts as rows of tokens: from texts, checked against the model's context, in batches of one length."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from mi_pipe.core.errors import PromptError
from mi_pipe.core.vocabulary import Vocabulary
from mi_pipe.models.info import ModelInfo
from mi_pipe.prompts.encoded import encode_texts
from mi_pipe.prompts.pairs import with_bos

Tokens = Int[np.ndarray, " pos"]
Prompts = str | Sequence[str] | Sequence[Tokens] | Sequence[Sequence[int]]
"""A text, texts (BOS is put before them), or rows of tokens as they are."""
BATCH_TOKENS = 1024


@dataclass(frozen=True)
class Batch:
    """Prompts of one length and their numbers."""

    rows: Int[np.ndarray, " row"]
    tokens: Int[Tensor, "row pos"]


def by_length(prompts: Sequence[Tokens], batch_tokens: int) -> Iterator[Batch]:
    """Yield prompts in batches of one length, the shortest first, of at most `batch_tokens` tokens (or one prompt)."""
    lengths = np.array([len(prompt) for prompt in prompts], np.int64)
    for length in np.unique(lengths):
        rows = np.flatnonzero(lengths == length)
        size = max(1, batch_tokens // max(1, int(length)))
        for start in range(0, len(rows), size):
            some = rows[start : start + size]
            yield Batch(some, torch.from_numpy(np.stack([prompts[i] for i in some]).astype(np.int64)))


def encode_prompts(vocabulary: Vocabulary, prompts: Prompts, prepend_bos: bool = True) -> list[Tokens]:
    """Return the tokens of each text after BOS, where it is wanted and there is one; rows of tokens as they are.

    Raises PromptError as `encode_texts` does.
    """
    several = [prompts] if isinstance(prompts, str) else list(prompts)
    texts = [prompt for prompt in several if isinstance(prompt, str)]
    encoded = iter(encode_texts(vocabulary, texts) if texts else [])
    rows = [with_bos(vocabulary, next(encoded), prepend_bos) if isinstance(one, str) else one for one in several]
    return [np.asarray(row, np.int64) for row in rows]


def check_room(prompts: Sequence[Tokens], n_tokens: int, info: ModelInfo) -> None:
    """Raise PromptError unless every prompt has tokens that the model knows, and room for `n_tokens` more."""
    for prompt in prompts:
        if not len(prompt):
            raise PromptError("A prompt has no tokens.")
        if len(prompt) + n_tokens > info.n_ctx:
            what = f"A prompt of {len(prompt)} tokens" + (f" and {n_tokens} new ones are" if n_tokens else " is")
            raise PromptError(f"{what} more than the model's context of {info.n_ctx}.")
        if not 0 <= min(prompt) <= max(prompt) < info.d_vocab:
            wrong = next(int(token) for token in prompt if not 0 <= token < info.d_vocab)
            raise PromptError(f"A prompt has token {wrong}, and the model has tokens 0 to {info.d_vocab - 1}.")
