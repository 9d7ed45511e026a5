"""What attention is computed from: q, k and v of every head as they enter the dot product, seen and replaced.

After rotation and after a norm of the heads' own (Qwen3), before keys and values are shared out to grouped queries;
so the same code serves fused projections, grouped queries, sliding windows and soft caps. HuggingFace models hand q, k
and v to an attention function of choice, native ones get a forward pass that does. Attention is written out here, with
the softmax in float32 at least, and is differentiable; whether it is the model's own, `recording` checks.
"""

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import Any, Protocol

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from mi_pipe.core.errors import StageError
from mi_pipe.models.model import Model

_NAME = "mi_pipe_watched"
_LISTENER = "_mi_pipe_listener"
_SINKS = "s_aux"


@dataclass(frozen=True)
class AttentionCall:
    """What one layer's attention is computed from."""

    q: Float[Tensor, "batch head pos d_head"]
    k: Float[Tensor, "batch kv_head pos d_head"]
    v: Float[Tensor, "batch kv_head pos d_head"]
    scaling: float
    mask: Float[Tensor, "*axes query key"] | None
    """Added to the scores, -inf or the lowest number where a key is not seen."""
    softcap: float | None = None

    @property
    def group(self) -> int:
        """Query heads for each key/value head."""
        return self.q.shape[1] // self.k.shape[1]

    def scores(
        self, q: Float[Tensor, "batch head query d_head"], k: Float[Tensor, "batch head key d_head"]
    ) -> Float[Tensor, "batch head query key"]:
        """Return scaled and capped scores without the mask; keys are given for every query head."""
        return self.capped(q @ k.mT * self.scaling)

    def capped(self, scores: Tensor) -> Tensor:
        """Return scores after the soft cap: cap * tanh(scores / cap)."""
        return scores if self.softcap is None else self.softcap * torch.tanh(scores / self.softcap)

    def for_heads(self, shared: Float[Tensor, "batch kv_head pos d_head"]) -> Float[Tensor, "batch head pos d_head"]:
        """Return keys or values for every query head: each key/value head serves `group` heads in a row."""
        return shared.repeat_interleave(self.group, dim=1)

    def masked(self, scores: Float[Tensor, "batch head query key"]) -> Float[Tensor, "batch head query key"]:
        """Return scores with what is not seen at (about) minus infinity."""
        return scores if self.mask is None else scores + self.mask.to(scores.dtype)

    def pattern(self) -> Float[Tensor, "batch head query key"]:
        """Return the attention pattern; rows sum to 1. At least float32."""
        scores = self.masked(self.scores(self.q, self.for_heads(self.k)))
        return scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))

    def z(self) -> Float[Tensor, "batch head pos d_head"]:
        """Return what each head reads: pattern @ v, in the dtype of v."""
        return self.pattern().to(self.v.dtype) @ self.for_heads(self.v)


class AttentionListener(Protocol):
    """Sees what each layer's attention is computed from, and may replace it."""

    def __call__(self, layer: int, call: AttentionCall) -> AttentionCall | None:
        """Return another call to be computed in its place, or None."""
        ...


def only_watch(layer: int, call: AttentionCall) -> None:
    """Listen and change nothing: attention is computed here all the same."""
    del layer, call


@contextmanager
def listening_to_attention(model: Model, listener: AttentionListener) -> Generator[None]:
    """Within the block, attention is computed here, and `listener` is asked at each layer.

    Raises StageError if the model does not compute attention in a way that can be watched.
    """
    modules = {layer: _attention_module(model, layer) for layer in range(model.info.n_layers)}
    for layer, module in modules.items():
        module.__dict__[_LISTENER] = (listener, layer)
    try:
        with _native(modules) if _is_native(model.module) else _huggingface(model):
            yield
    finally:
        for module in modules.values():
            module.__dict__.pop(_LISTENER, None)


def _attention_module(model: Model, layer: int) -> nn.Module:
    site = f"blocks.{layer}.attn.hook_out"
    path = model.hooks[site].module_path if site in model.hooks else None
    if path is None:
        raise StageError(
            f"Layer {layer} of {model.info.architecture} has no attention module whose q, k, v can be had."
        )
    return model.submodule(path)


def _is_native(module: nn.Module) -> bool:
    return type(module).__module__.startswith("transformer_lens.")


def _heard(module: nn.Module, call: AttentionCall) -> Float[Tensor, "batch head pos d_head"]:
    listener, layer = module.__dict__[_LISTENER]
    return (listener(layer, call) or call).z()


@contextmanager
def _huggingface(model: Model) -> Generator[None]:
    module: Any = model.module
    before = getattr(module.config, "_attn_implementation", None)
    # Imported late: they take seconds, which a command that only reads plans should not wait for.
    from transformers.masking_utils import AttentionMaskInterface, eager_mask
    from transformers.modeling_utils import AttentionInterface

    AttentionInterface.register(_NAME, _watched_attention)
    AttentionMaskInterface.register(_NAME, eager_mask)
    module.set_attn_implementation(_NAME)
    if module.config._attn_implementation != _NAME:
        raise StageError(
            f"{model.info.architecture} has an attention of its own, whose q, k and v cannot be had. Leave them out."
        )
    try:
        yield
    finally:
        module.set_attn_implementation(before)


def _watched_attention(
    module: nn.Module,
    query: Float[Tensor, "batch head pos d_head"],
    key: Float[Tensor, "batch kv_head pos d_head"],
    value: Float[Tensor, "batch kv_head pos d_head"],
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    **options: Any,
) -> tuple[Float[Tensor, "batch pos head d_head"], None]:
    if options.get(_SINKS) is not None:
        raise StageError("Attention with sinks (gpt-oss) cannot be attributed to q, k and v.")
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    z = _heard(module, AttentionCall(query, key, value, scale, attention_mask, softcap or None))
    return z.transpose(1, 2).contiguous(), None


@contextmanager
def _native(modules: Mapping[int, nn.Module]) -> Generator[None]:
    for module in modules.values():
        module.forward = MethodType(_native_forward, module)
    try:
        yield
    finally:
        for module in modules.values():
            del module.forward


def _native_forward(
    self: Any, hidden_states: Float[Tensor, "batch pos d_model"], position_ids: Tensor | None = None, **_: Any
) -> tuple[Float[Tensor, "batch pos d_model"], None]:
    q, k, v = (
        rearrange(project(hidden_states), "batch pos (head d_head) -> batch head pos d_head", d_head=self.d_head)
        for project in (self.q, self.k, self.v)
    )
    if self.rotary is not None:
        q, k = self.rotary.apply_rope(q, k, position_ids=position_ids)
    n_pos = q.shape[2]
    mask = q.new_zeros(n_pos, n_pos).masked_fill(self.causal_mask[:n_pos, :n_pos] & self.causal, -torch.inf)
    cap = self.attn_scores_soft_cap if self.attn_scores_soft_cap > 0 else None
    call = AttentionCall(q, k, v, 1 / self.scale, mask, cap)
    z = _heard(self, call)
    return self.o(rearrange(z, "batch head pos d_head -> batch pos (head d_head)")), None
