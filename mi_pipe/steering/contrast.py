"""Directions from contrasts: the mean activation of some prompts less that of others (difference of means).

d = mean over positive tokens of x - mean over negative tokens of x, at one hook point, at each prompt's last token or
at all but BOS; sums in float64 (Turner et al. 2023 take one pair of prompts, Panickssery et al. 2023 many).
"""

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from mi_pipe.core.errors import PromptError
from mi_pipe.models.model import Model
from mi_pipe.patching.recording import record
from mi_pipe.steering.batches import BATCH_TOKENS, Prompts, Tokens, by_length, check_room, encode_prompts
from mi_pipe.steering.direction import Direction, check_hook

Position = Literal["last", "all"]
_MASSIVE = 10.0
"""Times the median norm, as in the activation store."""


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
    positive: Prompts,
    negative: Prompts,
    hook: str,
    position: Position = "last",
    batch_tokens: int = BATCH_TOKENS,
) -> Direction:
    """Return the difference of means of two sets of prompts, scaled by the means' distance.

    Texts are put after BOS; rows of tokens are taken as they are. Raises HookPointError, PromptError for prompts that
    the model cannot read or a side without tokens, ConfigError if the means are equal.
    """
    check_hook(model.hooks, hook)
    sides = [encode_prompts(model.vocabulary, prompts) for prompts in (positive, negative)]
    for prompts in sides:
        check_room(prompts, 0, model.info)
    means = [mean_activation(model, hook, prompts, position, batch_tokens) for prompts in sides]
    source = f"difference of means of {len(sides[0])} and {len(sides[1])} prompts, position {position}"
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
