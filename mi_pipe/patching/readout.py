"""From prompts or last hidden states to the logits that a metric reads, without the rest of the vocabulary."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mi_pipe.models.model import Model, as_logits
from mi_pipe.patching.metrics import PairInfo


def last_logits(model: Model, tokens: Int[Tensor, "batch pos"], **options: Any) -> Float[Tensor, "batch d_vocab"]:
    """Run the plain model and return, in float32 at least, its own logits at the last position.

    Other positions are not unembedded. `options` go to the model's forward, such as a cache.
    """
    with model.edited({"unembed.hook_in": lambda normed: normed[:, -1:]}):
        return wide(as_logits(model.module(tokens, **options))[:, -1])


@dataclass(frozen=True)
class LogitMap:
    """What a model does to its logits after the unembedding: a factor, then a soft cap c tanh(x / c)."""

    factor: float = 1.0
    cap: float = 0.0

    @classmethod
    def of(cls, module: Any) -> "LogitMap":
        """Read it from a HuggingFace config (Gemma 2, Cohere, Granite) or a native model's."""
        config = getattr(module, "config", None) or getattr(module, "cfg", None)
        factor = float(getattr(config, "logit_scale", None) or 1.0) / float(
            getattr(config, "logits_scaling", None) or 1.0
        )
        cap = getattr(config, "final_logit_softcapping", None) or getattr(config, "output_logits_soft_cap", None)
        return cls(factor, max(float(cap or 0.0), 0.0))

    def __call__(self, logits: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Return the model's logits from the unembedding's."""
        scaled = logits if self.factor == 1.0 else logits * self.factor
        return self.cap * torch.tanh(scaled / self.cap) if self.cap else scaled


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
