"""Calling a model's own blocks one by one, so that a run can start in the middle.

Steps:
1. run one prompt and note, by a forward pre-hook on every block, what it is called with besides the hidden
   states: rotary tables, masks, position ids, whatever the architecture hands around;
2. call block after block with other hidden states and these arguments, their batch axis of one row expanded.

Exact for left-to-right models whose blocks talk to each other through the hidden states alone, on prompts of
the captured length without padding. Whether a model is one of these is checked by `engine`, not assumed.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mi_pipe.models.model import Model

_HIDDEN = "hidden_states"
_MIN_BATCHED_DIMS = 2


class BlockCalls:
    """The blocks of a model, ready to be called on hidden states of prompts of one length."""

    def __init__(self, model: Model, tokens: Int[Tensor, "batch pos"]) -> None:
        """Capture the blocks' arguments by running the first prompt of `tokens`."""
        self.n_pos = int(tokens.shape[1])
        self.blocks = list(model.blocks)
        self._arguments: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        handles = [self._watch(layer, block) for layer, block in enumerate(self.blocks)]
        try:
            with torch.no_grad():
                model.module(tokens[:1].to(model.device), use_cache=False)
        finally:
            for handle in handles:
                handle.remove()

    def __len__(self) -> int:
        """Return the number of blocks."""
        return len(self.blocks)

    def call(self, layer: int, hidden: Float[Tensor, "row pos d_model"]) -> Float[Tensor, "row pos d_model"]:
        """Run one block on the hidden states that enter it."""
        args, kwargs = self.arguments(layer, len(hidden))
        output = self.blocks[layer](hidden, *args, **kwargs)
        return output[0] if isinstance(output, tuple) else output

    def run(
        self, hidden: Float[Tensor, "row pos d_model"], start: int, stop: int | None = None
    ) -> Float[Tensor, "row pos d_model"]:
        """Run the blocks start..stop-1 (default: to the last) on the hidden states that enter block `start`."""
        for layer in range(start, len(self) if stop is None else stop):
            hidden = self.call(layer, hidden)
        return hidden

    def arguments(self, layer: int, n_rows: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return what a block is called with after the hidden states, for a batch of `n_rows`."""
        args, kwargs = self._arguments[layer]
        return _expand(args, n_rows), _expand(kwargs, n_rows)

    def _watch(self, layer: int, block: nn.Module) -> Any:
        def note(_block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            rest = {name: value for name, value in kwargs.items() if name != _HIDDEN}
            self._arguments[layer] = (args[1:], rest)

        return block.register_forward_pre_hook(note, with_kwargs=True)


def _expand(value: Any, n_rows: int) -> Any:
    """Expand, in nested arguments, every tensor that has a batch axis (the captured run had one row)."""
    if isinstance(value, Tensor):
        is_batched = value.ndim >= _MIN_BATCHED_DIMS and value.shape[0] == 1
        return value.expand(n_rows, *value.shape[1:]) if is_batched else value
    if isinstance(value, tuple | list):
        return type(value)(_expand(item, n_rows) for item in value)
    if isinstance(value, dict):
        return {name: _expand(item, n_rows) for name, item in value.items()}
    return value
