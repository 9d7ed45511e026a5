"""Directions from contrasts: the mean activation of some prompts less that of others (difference of means).

d = mean over positive tokens of x - mean over negative tokens of x, at one hook point, at each prompt's last token or
at all but BOS; sums in float64 (Turner et al. 2023 take one pair of prompts, Panickssery et al. 2023 many).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mi_pipe.core.errors import PromptError
from mi_pipe.models.model import Model
from mi_pipe.patching.recording import record
from mi_pipe.steering.direction import Direction, check_hook

Position = Literal["last", "all"]
Tokens = Int[np.ndarray, " pos"]
BATCH_TOKENS = 1024
_MASSIVE = 10.0
"""Times the median norm, as in the activation store."""


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


def activations(
    model: Model, hook: str, prompts: Sequence[Tokens], position: Position, batch_tokens: int = BATCH_TOKENS
) -> Iterator[Float[Tensor, "row d"]]:
    """Yield the values at a hook point at each prompt's last token, or at all of its tokens but BOS, batch by batch.

    Raises PromptError if a prompt has no such token.
    """
    bos_id = model.vocabulary.bos_id
    for batch in by_length(prompts, batch_tokens):
        if not batch.tokens.shape[1]:
            raise PromptError("A prompt has no tokens: there is no activation to take.")
        _, found = record(model, batch.tokens.to(model.device), [hook])
        value = found[hook].reshape(*batch.tokens.shape, -1)
        if position == "last":
            yield value[:, -1]
            continue
        is_text = torch.ones(batch.tokens.shape, dtype=torch.bool)
        is_text[:, 0] = batch.tokens[:, 0] != (-1 if bos_id is None else bos_id)
        yield value[is_text.to(value.device)]


def mean_activation(
    model: Model, hook: str, prompts: Sequence[Tokens], position: Position, batch_tokens: int = BATCH_TOKENS
) -> Float[Tensor, " d"]:
    """Return the mean of `activations` over all tokens; float64 on the CPU. Raises PromptError if there are none."""
    total, n_rows = None, 0
    for rows in activations(model, hook, prompts, position, batch_tokens):
        summed = rows.cpu().double().sum(0)
        total = summed if total is None else total + summed
        n_rows += len(rows)
    if total is None or not n_rows:
        raise PromptError("A side of the contrast has no tokens beside BOS: there is no mean to take.")
    return total / n_rows


def from_contrast(
    model: Model,
    positive: Sequence[Tokens],
    negative: Sequence[Tokens],
    hook: str,
    position: Position = "last",
    batch_tokens: int = BATCH_TOKENS,
) -> Direction:
    """Return the difference of means of two sets of prompts (tokens, BOS included), scaled by the means' distance.

    Raises HookPointError, PromptError for a side without tokens, ConfigError if the means are equal.
    """
    check_hook(model.hooks, hook)
    means = [mean_activation(model, hook, prompts, position, batch_tokens) for prompts in (positive, negative)]
    source = f"difference of means of {len(positive)} and {len(negative)} prompts, position {position}"
    return Direction.of(hook, means[0] - means[1], "contrast", source)


def usual_activations(
    model: Model, hooks: Sequence[str], prompts: Sequence[Tokens], batch_tokens: int = BATCH_TOKENS
) -> Float[Tensor, "row d"]:
    """Return the values at hook points, side by side, at the usual tokens; float32 on the CPU.

    Left out are BOS and tokens with more than ten times the median norm at one of the hook points.
    """
    values, is_usual = [], torch.ones(0, dtype=torch.bool)
    for hook in hooks:
        value = torch.cat([rows.float().cpu() for rows in activations(model, hook, prompts, "all", batch_tokens)])
        norms = value.norm(dim=1)
        usual = norms <= _MASSIVE * norms.median()
        is_usual = is_usual & usual if values else usual
        values.append(value)
    return torch.cat(values, dim=1)[is_usual]
