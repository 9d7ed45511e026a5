"""Calling a model's own blocks one by one, so that a run can start at any layer and at any position.

Steps:
1. run one prompt and note, by a forward pre-hook on every block, what it is called with besides the hidden
   states: rotary tables, masks, position ids, whatever the architecture hands around;
2. call block after block with other hidden states and these arguments, the batch axis of one row expanded;
3. to start at a position, cut the arguments to the positions from there on, and give the attention the keys
   and values of the earlier positions from a stored run, where the model's blocks take such a cache.

Exact for left-to-right models whose blocks talk to each other through the hidden states alone, on prompts of
the captured length without padding. Whether a model is one of these is checked by `engine`, not assumed.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import Cache, DynamicCache

from mi_pipe.models.model import Model
from mi_pipe.patching.block_parts import block_parts
from mi_pipe.patching.edits import forced, last_position_only

_MASK = "attention_mask"
_MASK_DIMS = 4
_BATCHED_DIMS = (2, 3)


@dataclass(frozen=True)
class KeysValues:
    """Keys and values of every layer, each (pair, kv_head, pos, d_head), of a stored run."""

    layers: list[tuple[Tensor, Tensor]]

    @classmethod
    def of_cache(cls, cache: DynamicCache) -> "KeysValues | None":
        """Take what a model's forward pass left in its cache, or None if it used none."""
        found = [(getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in cache.layers]
        usable = [(keys, values) for keys, values in found if keys is not None and values is not None]
        return cls(usable) if usable and len(usable) == len(found) else None

    def prefix(self, rows: Int[Tensor, " row"], stop: int) -> "Prefix":
        """Return the positions before `stop` of these pairs, in the form that attention modules ask for."""
        return Prefix(self, rows, stop)


@dataclass(frozen=True)
class Prefix:
    """Keys and values of earlier positions, under the one method of a HuggingFace cache that attention calls."""

    stored: KeysValues
    rows: Int[Tensor, " row"]
    stop: int

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Return the stored keys and values followed by the new ones; nothing is kept."""
        old_keys, old_values = self.stored.layers[layer_idx]
        return (
            torch.cat([old_keys[self.rows, :, : self.stop], keys], dim=2),
            torch.cat([old_values[self.rows, :, : self.stop], values], dim=2),
        )


class BlockCalls:
    """The blocks of a model, ready to be called on hidden states of prompts of one length."""

    def __init__(self, model: Model, tokens: Int[Tensor, "batch pos"]) -> None:
        """Capture the blocks' arguments by running the first prompt of `tokens`."""
        self.n_pos = int(tokens.shape[1])
        self.blocks = list(model.blocks)
        self._arguments: dict[int, dict[str, Any]] = {}
        self._cache_names: dict[int, list[str]] = {}
        self._n_returned: dict[nn.Module, int] = {}
        self.parts = [block_parts(model, layer) for layer in range(len(self.blocks))]
        handles = [self._watch(layer, block) for layer, block in enumerate(self.blocks)]
        handles += [self._watch_outputs(part.attention) for part in self.parts if part.attention is not None]
        try:
            with torch.no_grad():
                model.module(tokens[:1].to(model.device), use_cache=True)
        finally:
            for handle in handles:
                handle.remove()

    def __len__(self) -> int:
        """Return the number of blocks."""
        return len(self.blocks)

    @property
    def takes_prefix(self) -> bool:
        """Say whether every block takes a cache of keys and values and a mask."""
        return all(self._cache_names[layer] and _MASK in self._arguments[layer] for layer in range(len(self)))

    def call(
        self,
        layer: int,
        hidden: Float[Tensor, "row pos d_model"],
        prefix: Prefix | None = None,
        outputs: Mapping[nn.Module, Tensor] | None = None,
    ) -> Float[Tensor, "row pos d_model"]:
        """Run one block on the hidden states that enter it (those from position `prefix.stop` on, if given).

        Modules in `outputs` are not run: they return what is given.
        """
        returned = {module: self._as_returned(module, value) for module, value in (outputs or {}).items()}
        with forced(returned):
            output = self.blocks[layer](hidden, **self.arguments(layer, len(hidden), prefix))
        return output[0] if isinstance(output, tuple) else output

    def call_at_last(
        self, layer: int, hidden: Float[Tensor, "row pos d_model"], prefix: Prefix | None = None
    ) -> Float[Tensor, "row 1 d_model"]:
        """Run one block for the last position's output alone: keys and values of all, the rest of the last.

        The block sees the last hidden state, its attention the normalised states of all positions; the output
        projection of the attention is given the last position only.
        """
        parts = self.parts[layer]
        assert parts.norm is not None, "asked only where the block has a norm and a projection"
        assert parts.projection is not None, "asked only where the block has a norm and a projection"
        with last_position_only(parts.projection):
            output = self.call(layer, hidden[:, -1:], prefix, {parts.norm: parts.norm(hidden)})
        return output[:, -1:]

    @property
    def can_narrow(self) -> bool:
        """Say whether the last block's norm and projection are known."""
        return self.parts[-1].norm is not None and self.parts[-1].projection is not None

    def run(
        self,
        hidden: Float[Tensor, "row pos d_model"],
        start: int,
        stop: int | None = None,
        prefix: Prefix | None = None,
    ) -> Float[Tensor, "row pos d_model"]:
        """Run the blocks start..stop-1 (default: to the last) on the hidden states that enter block `start`."""
        for layer in range(start, len(self) if stop is None else stop):
            hidden = self.call(layer, hidden, prefix)
        return hidden

    def arguments(self, layer: int, n_rows: int, prefix: Prefix | None = None) -> dict[str, Any]:
        """Return what a block is called with besides the hidden states, for a batch of `n_rows`."""
        arguments = self._arguments[layer]
        if prefix is None:
            return _expand(arguments, n_rows)
        mask = arguments[_MASK]
        if mask is None:
            device = next(self.blocks[layer].parameters()).device
            mask = torch.ones(self.n_pos, self.n_pos, dtype=torch.bool, device=device).tril()[None, None]
        cut = _cut({**arguments, _MASK: mask}, prefix.stop, self.n_pos)
        return {**_expand(cut, n_rows), **dict.fromkeys(self._cache_names[layer], prefix)}

    def _as_returned(self, module: nn.Module, value: Tensor) -> Any:
        """Return a value in the form that a module returns it: attention returns a tuple."""
        n_returned = self._n_returned.get(module, 0)
        return (value, *[None] * (n_returned - 1)) if n_returned else value

    def _watch_outputs(self, module: nn.Module) -> Any:
        def note(_module: nn.Module, _args: Any, output: Any) -> None:
            self._n_returned[module] = len(output) if isinstance(output, tuple) else 0

        return module.register_forward_hook(note)

    def _watch(self, layer: int, block: nn.Module) -> Any:
        signature = inspect.signature(block.forward)

        def note(_block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            named = _named(signature, args, kwargs)
            self._cache_names[layer] = [name for name, value in named.items() if isinstance(value, Cache)]
            self._arguments[layer] = {**named, **dict.fromkeys(self._cache_names[layer])}

        return block.register_forward_pre_hook(note, with_kwargs=True)


def _named(signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return a call's arguments by name, without the first, the hidden states."""
    named = dict(signature.bind(*args, **kwargs).arguments)
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            named.update(named.pop(name, {}))
    hidden = next(iter(signature.parameters))
    return {name: value for name, value in named.items() if name != hidden}


def _expand(value: Any, n_rows: int) -> Any:
    """Expand, in nested arguments, every tensor that has a batch axis (the captured run had one row)."""
    if isinstance(value, Tensor):
        is_batched = value.ndim >= min(_BATCHED_DIMS) and value.shape[0] == 1
        return value.expand(n_rows, *value.shape[1:]) if is_batched else value
    if isinstance(value, tuple | list):
        return type(value)(_expand(item, n_rows) for item in value)
    if isinstance(value, dict):
        return {name: _expand(item, n_rows) for name, item in value.items()}
    return value


def _cut(value: Any, first: int, n_pos: int) -> Any:
    """Keep, in nested arguments, the positions from `first` on; of a mask (…, query, key) the queries."""
    if isinstance(value, Tensor):
        axis = {1: 0, 2: 1, 3: 1, _MASK_DIMS: 2}.get(value.ndim)
        return value if axis is None or value.shape[axis] != n_pos else value.narrow(axis, first, n_pos - first)
    if isinstance(value, tuple | list):
        return type(value)(_cut(item, first, n_pos) for item in value)
    if isinstance(value, dict):
        return {name: _cut(item, first, n_pos) for name, item in value.items()}
    return value
