"""A linear toy: a native model of one block whose attention and MLP write nothing, without a final norm."""

import torch

from mi_pipe.models.model import Model
from mi_pipe.models.trained import native_module, wrap_native

WIDTH, D_VOCAB = 16, 24


def linear_toy() -> Model:
    """Logits are (W_E[token] + what is added) W_U."""
    fields = {
        "n_layers": 1, "d_model": WIDTH, "n_heads": 2, "d_head": 8, "d_mlp": 16, "n_ctx": 16, "d_vocab": D_VOCAB,
        "act_fn": "relu", "normalization_type": None, "positional_embedding_type": "rotary", "seed": 4,
    }  # fmt: skip
    module = native_module(fields)
    with torch.no_grad():
        for name, weight in module.named_parameters():
            if name.startswith("layers."):
                weight.zero_()
            elif weight.ndim > 1:
                weight.normal_(generator=torch.Generator().manual_seed(len(name)))
    return wrap_native(module)
