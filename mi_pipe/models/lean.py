"""Runs a plain model for its hidden values: the same function with fewer passes over memory, and no key/value cache.

Attention stays fused (SDPA; native toys get it here), unless attention patterns are asked for: those exist only where
attention is computed step by step. GPT-2's GELU, in transformers seven elementwise operations, is torch's one kernel of
the same formula (a tenth of such a model's time on a CPU; equal to about 1e-7).
"""

from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch.nn.functional as F  # noqa: N812 (its customary name)
from torch import Tensor, nn

from mi_pipe.models.fused import fused_attention

_TANH_GELU_NAMES = ("NewGELUActivation", "FastGELUActivation")


@contextmanager
def lean(module: nn.Module, with_patterns: bool = False) -> Generator[dict[str, Any]]:
    """Within the block the model runs lean; yields the keyword arguments to call it with."""
    with ExitStack() as stack:
        if hasattr(module, "set_attn_implementation"):
            if with_patterns:
                stack.enter_context(_eager_attention(module))
        elif not with_patterns and type(module).__module__.startswith("transformer_lens."):
            stack.enter_context(fused_attention(module))
        stack.enter_context(_one_kernel_gelu(module))
        yield {"use_cache": False} if hasattr(getattr(module, "config", None), "use_cache") else {}


@contextmanager
def _eager_attention(module: Any) -> Generator[None]:
    before = module.config._attn_implementation
    module.set_attn_implementation("eager")
    try:
        yield
    finally:
        module.set_attn_implementation(before)


@contextmanager
def _one_kernel_gelu(module: nn.Module) -> Generator[None]:
    found = [part for part in module.modules() if type(part).__name__ in _TANH_GELU_NAMES]
    for part in found:
        part.forward = _gelu_tanh
    try:
        yield
    finally:
        for part in found:
            del part.forward


def _gelu_tanh(value: Tensor) -> Tensor:
    return F.gelu(value, approximate="tanh")
