"""A loaded language model: its own modules as they are, and TransformerLens' bridge around the same weights.

`module` is the plain model: fast (SDPA attention), reached by module paths from `hooks`. `bridge` is built
when first asked for, around a structural copy that shares every tensor, so that the plain model stays plain.
"""

import copy
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mi_pipe.core.errors import HookPointError
from mi_pipe.core.vocabulary import Vocabulary
from mi_pipe.models.hook_points import HookMap, HookSite
from mi_pipe.models.info import ModelInfo

Edit = Callable[[Tensor], Tensor | None]


class Model:
    """A decoder-only transformer in evaluation mode, without gradients on its parameters."""

    def __init__(
        self,
        module: nn.Module,
        info: ModelInfo,
        hooks: HookMap,
        vocabulary: Vocabulary,
        wrap: Callable[[nn.Module], Any],
    ) -> None:
        """Hold a plain module; `wrap` builds a TransformerBridge around a copy of it."""
        self.module = module.eval().requires_grad_(False)
        self.info = info
        self.hooks = hooks
        self.vocabulary = vocabulary
        self._wrap = wrap

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self.module.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return next(self.module.parameters()).dtype

    @cached_property
    def bridge(self) -> Any:
        """The TransformerBridge (eager attention), sharing this model's tensors."""
        tensors = {id(tensor): tensor for tensor in (*self.module.parameters(), *self.module.buffers())}
        return self._wrap(copy.deepcopy(self.module, memo=dict(tensors)))

    def logits(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_vocab"]:
        """Run the plain model."""
        return as_logits(self.module(tokens))

    def submodule(self, path: str) -> nn.Module:
        """Return one of the plain model's modules."""
        return self.module.get_submodule(path)

    @cached_property
    def blocks(self) -> nn.ModuleList:
        """The plain model's transformer blocks."""
        path = self._native("blocks.0.hook_resid_post").module_path
        assert path is not None, "a block is always one module"
        return self.module.get_submodule(path.rpartition(".")[0])  # pyright: ignore[reportReturnType]

    @cached_property
    def final_norm(self) -> nn.Module:
        """The plain model's last normalisation."""
        return self.submodule(self._native("ln_final.hook_out").module_path or "")

    @cached_property
    def unembedding(self) -> nn.Module:
        """The plain model's map from the last normalisation to logits (before any soft cap)."""
        return self.submodule(self._native("unembed.hook_out").module_path or "")

    @property
    def W_U(self) -> Float[Tensor, "d_model d_vocab"]:  # noqa: N802 (the field's name)
        """The unembedding matrix."""
        weight = self.unembedding.weight
        assert isinstance(weight, Tensor)
        return weight.T

    @contextmanager
    def edited(self, edits: dict[str, Edit]) -> Generator[None]:
        """Within the block, call each function on the value at its hook point of the plain model.

        A function that returns a tensor replaces the value (same shape as the module's own, heads not split);
        one that returns None only reads it. Raises HookPointError for unknown hook points and for those that
        only the bridge has.
        """
        handles = [self._register(self._native(name), edit) for name, edit in edits.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _native(self, name: str) -> HookSite:
        site = self.hooks[name]
        if site.module_path is None:
            raise HookPointError(
                f"Hook point {name!r} is not the input or output of one of the model's own modules; use the bridge."
            )
        return site

    def _register(self, site: HookSite, edit: Edit) -> Any:
        module = self.submodule(site.module_path or "")
        if site.side == "out":
            return module.register_forward_hook(lambda _module, _args, output: _edit_output(output, edit))
        return module.register_forward_pre_hook(
            lambda _module, args, kwargs: _edit_input(args, kwargs, edit), with_kwargs=True
        )


def as_logits(output: Any) -> Tensor:
    """Return the logits of a model's output, be it a tensor or a HuggingFace output."""
    return output if isinstance(output, Tensor) else output.logits


def _edit_output(output: Any, edit: Edit) -> Any:
    value = output[0] if isinstance(output, tuple) else output
    new = edit(value)
    if new is None:
        return None
    return (new, *output[1:]) if isinstance(output, tuple) else new


def _edit_input(args: tuple[Any, ...], kwargs: dict[str, Any], edit: Edit) -> Any:
    new = edit(args[0] if args else kwargs["hidden_states"])
    if new is None:
        return None
    return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": new})
