"""Attention patterns of a model, given away layer by layer while it runs, so that few are in memory at once.

Patterns exist only where attention is computed step by step, so they come from TransformerLens' bridge.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mi_pipe.models.hook_points import HookMap
from mi_pipe.models.model import Model, as_logits

PatternListener = Callable[[int, Float[Tensor, "batch head query key"]], None]
Change = Callable[[Tensor], Tensor | None]


def pattern_hook(layer: int) -> str:
    """Return the hook point of a layer's attention pattern.

    >>> pattern_hook(2)
    'blocks.2.attn.hook_pattern'
    """
    return f"blocks.{layer}.attn.hook_pattern"


def check_patterns(hooks: HookMap, n_layers: int) -> None:
    """Raise HookPointError if the model has no attention patterns to look at."""
    for layer in range(n_layers):
        hooks[pattern_hook(layer)]


@torch.no_grad()
def watch_patterns(
    model: Model,
    tokens: Int[Tensor, "batch pos"],
    listener: PatternListener,
    also: Mapping[str, Change] | None = None,
) -> Float[Tensor, "batch pos d_vocab"]:
    """Run the bridge, call `listener(layer, pattern)` for every layer, and return the logits.

    pattern[b, h, q, k] is the share of attention that head h pays at position q to position k; rows sum to 1.
    `also` has functions that are called with the value at further hook points of the bridge, and may change it.
    """

    def pass_on(value: Tensor, hook: Any, layer: int) -> None:
        del hook
        listener(layer, value.detach())

    def change(value: Tensor, hook: Any, edit: Change) -> Tensor | None:
        del hook
        return edit(value)

    hooks: list[tuple[str, Any]] = [(name, partial(change, edit=edit)) for name, edit in (also or {}).items()]
    hooks += [(pattern_hook(layer), partial(pass_on, layer=layer)) for layer in range(model.info.n_layers)]
    return as_logits(model.bridge.run_with_hooks(tokens.to(model.device), fwd_hooks=hooks))
