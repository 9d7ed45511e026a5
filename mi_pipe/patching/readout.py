"""From prompts or last hidden states to the few logits that a metric reads, without the rest of the vocabulary."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mi_pipe.models.model import Model, as_logits


def last_logits(model: Model, tokens: Int[Tensor, "batch pos"], **options: Any) -> Float[Tensor, "batch d_vocab"]:
    """Run the plain model and return, in float32, its own logits at the last position.

    Other positions are not unembedded. `options` go to the model's forward, such as a cache.
    """
    with model.edited({"unembed.hook_in": lambda normed: normed[:, -1:]}):
        return as_logits(model.module(tokens, **options))[:, -1].float()


def token_logits(
    model: Model, hidden: Float[Tensor, "row pos d_model"], tokens: Int[Tensor, "row choice"]
) -> Float[Tensor, "row choice"]:
    """Return, in float32, the last position's logits of each row's `tokens`.

    Final norm, then the rows of the unembedding that belong to these tokens. A soft cap or scale that a model
    applies to its logits afterwards is not applied here: `engine` compares with the model's own logits.
    """
    unembedding = model.unembedding
    normed = model.final_norm(hidden[:, -1:]).squeeze(1)
    weight, bias = unembedding.weight, getattr(unembedding, "bias", None)
    assert isinstance(weight, Tensor), "an unembedding has a weight matrix (d_vocab, d_model)"
    logits = torch.einsum("rd,rcd->rc", normed.float(), weight[tokens].float())
    return logits + bias[tokens].float() if isinstance(bias, Tensor) else logits


def choice_diff(logits: Float[Tensor, "row choice"]) -> Float[Tensor, " row"]:
    """Return logit[answer] - logit[wrong] from the logits of (answer, wrong)."""
    return logits[:, 0] - logits[:, 1]
