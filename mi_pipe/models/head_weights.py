"""W_Q, W_K, W_V and W_O of every head, in TransformerLens' orientation, read from the model's own modules.

The hook points of q, k and v say which module computes them, and which of its outputs they are where one projection
computes all three (GPT-2, GPT-NeoX). Under grouped queries there are fewer keys and values than queries: head h reads
those of key/value head h // (n_heads / n_kv_heads). Nothing is folded or centred: these are the weights as trained.
"""

from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from mi_pipe.core.errors import HookPointError
from mi_pipe.models.hook_points import HookMap
from mi_pipe.models.info import ModelInfo
from mi_pipe.models.model import Model
from mi_pipe.models.reading import Columns

_CONV_1D = "Conv1D"
_PARTS = {"q": "attn.hook_q", "k": "attn.hook_k", "v": "attn.hook_v"}
_Z = "attn.hook_z"


@dataclass(frozen=True)
class HeadWeights:
    """The attention weights of one layer, in the model's dtype."""

    W_Q: Float[Tensor, "head d_model d_head"]
    W_K: Float[Tensor, "kv_head d_model d_head"]
    W_V: Float[Tensor, "kv_head d_model d_head"]
    W_O: Float[Tensor, "head d_head d_model"]
    b_V: Float[Tensor, "kv_head d_head"] | None  # noqa: N815 (the field's name, as W_V)
    b_O: Float[Tensor, " d_model"] | None  # noqa: N815
    """The output bias, which belongs to no head."""

    @property
    def n_heads(self) -> int:
        """Number of query heads."""
        return self.W_Q.shape[0]

    def to_heads(self, per_kv_head: Float[Tensor, "kv_head *rest"]) -> Float[Tensor, "head *rest"]:
        """Repeat what key/value heads have for each of the heads that share it."""
        return per_kv_head.repeat_interleave(self.n_heads // len(per_kv_head), dim=0)


def check_head_weights(hooks: HookMap, info: ModelInfo) -> None:
    """Raise HookPointError if q, k, v or z is not what a linear map of the model's own computes; needs no weights."""
    for layer in range(info.n_layers):
        for name in (f"blocks.{layer}.{part}" for part in (*_PARTS.values(), _Z)):
            if hooks[name].reading is None:
                raise HookPointError(
                    f"The weights of heads of {info.architecture} are not known: no module has {name}."
                )


def head_weights(model: Model, layer: int) -> HeadWeights:
    """Return one layer's weights by head; raises HookPointError where the model has no such linear maps."""
    info = model.info
    counts = {"q": info.n_heads, "k": info.n_kv_heads, "v": info.n_kv_heads}
    parts = {kind: _projection(model, f"blocks.{layer}.{_PARTS[kind]}", count) for kind, count in counts.items()}
    output = _linear(model, f"blocks.{layer}.{_Z}")
    return HeadWeights(
        W_Q=parts["q"][0],
        W_K=parts["k"][0],
        W_V=parts["v"][0],
        W_O=rearrange(_outputs_first(output), "d_model (h d_head) -> h d_head d_model", h=info.n_heads),
        b_V=parts["v"][1],
        b_O=_bias(output),
    )


def _projection(
    model: Model, hook: str, n_heads: int
) -> tuple[Float[Tensor, "head d_model d_head"], Float[Tensor, "head d_head"] | None]:
    module = _linear(model, hook)
    weight, bias = _outputs_first(module), _bias(module)
    reading = model.hooks[hook].reading
    if reading is not None and isinstance(reading.rule, Columns):
        rows = torch.tensor(reading.rule.indices, device=weight.device)
        weight, bias = weight[rows], None if bias is None else bias[rows]
    by_head = rearrange(weight, "(h d_head) d_model -> h d_model d_head", h=n_heads)
    return by_head, None if bias is None else rearrange(bias, "(h d_head) -> h d_head", h=n_heads)


def _linear(model: Model, hook: str) -> nn.Module:
    reading = model.hooks[hook].reading
    module = None if reading is None else model.submodule(reading.module_path)
    if module is None or getattr(getattr(module, "weight", None), "ndim", 0) != 2:  # noqa: PLR2004 (a matrix)
        raise HookPointError(
            f"The weights of heads of {model.info.architecture} are not known: {hook} is no linear map."
        )
    return module


def _bias(module: nn.Module) -> Tensor | None:
    bias = getattr(module, "bias", None)
    return bias if isinstance(bias, Tensor) else None


def _outputs_first(module: nn.Module) -> Float[Tensor, "d_out d_in"]:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.T if type(module).__name__ == _CONV_1D else weight
