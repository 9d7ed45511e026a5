"""From the last hidden states to the few logits that a metric reads, without the rest of the vocabulary."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mi_pipe.models.model import Model


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


def last_logit_diff(
    model: Model, hidden: Float[Tensor, "row pos d_model"], choices: Int[Tensor, "row choice"]
) -> Float[Tensor, " row"]:
    """Return logit[answer] - logit[wrong] at the last position; `choices` holds (answer, wrong) of each row."""
    logits = token_logits(model, hidden, choices)
    return logits[:, 0] - logits[:, 1]
