"""From prompts or last hidden states to the logits that a metric reads, without the rest of the vocabulary."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mi_pipe.models.logit_map import LogitMap
from mi_pipe.models.model import Model, as_logits
from mi_pipe.patching.metrics import PairInfo


def last_logits(model: Model, tokens: Int[Tensor, "batch pos"], **options: Any) -> Float[Tensor, "batch d_vocab"]:
    """Run the plain model and return, in float32 at least, its own logits at the last position.

    Other positions are not unembedded. `options` go to the model's forward, such as a cache.
    """
    with model.edited({"unembed.hook_in": lambda normed: normed[:, -1:]}):
        return wide(as_logits(model.module(tokens, **options))[:, -1])


def token_logits(
    model: Model, hidden: Float[Tensor, "row pos d_model"], tokens: Int[Tensor, "row choice"]
) -> Float[Tensor, "row choice"]:
    """Return, in float32 at least, the last position's logits of each row's `tokens`.

    Final norm, then the rows of the unembedding that belong to these tokens.
    """
    unembedding = model.unembedding
    normed = model.final_norm(hidden[:, -1:]).squeeze(1)
    weight, bias = unembedding.weight, getattr(unembedding, "bias", None)
    assert isinstance(weight, Tensor), "an unembedding has a weight matrix (d_vocab, d_model)"
    logits = (wide(normed)[:, None] * wide(weight[tokens])).sum(-1)
    logits = logits + wide(bias[tokens]) if isinstance(bias, Tensor) else logits
    return LogitMap.of(model.module)(logits)


def all_logits(model: Model, hidden: Float[Tensor, "row pos d_model"]) -> Float[Tensor, "row d_vocab"]:
    """Return, in float32 at least, all logits of the last position."""
    return LogitMap.of(model.module)(wide(model.unembedding(model.final_norm(hidden[:, -1:])).squeeze(1)))


def read_logits(logits: Float[Tensor, "row d_vocab"], info: PairInfo, all_of_them: bool) -> Float[Tensor, "row n"]:
    """Return of whole rows of logits what a metric is given."""
    return logits if all_of_them else logits.gather(-1, info.choices)


def wide(value: Tensor) -> Tensor:
    """Return the tensor in float32, or as it is if it is wider."""
    return value.to(torch.promote_types(value.dtype, torch.float32))
