"""Hook points that are named by a module's path: `<path>` is the module's output, `<path>.input` its input.

Any torch module has them. Their shapes are found by running it once, for a language model on torch's meta device.
An attention module that returns its patterns (batch, head, query, key) beside its output has also `<path>.pattern`.
"""

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mi_pipe.models.hook_points import HookSite
from mi_pipe.models.reading import Reading, first_tensor, module_input

INPUT_SUFFIX = ".input"
PATTERN_SUFFIX = ".pattern"
_PATTERN_DIMS = 4


def module_paths(module: nn.Module) -> dict[int, str]:
    """Return the path of every sub-module by `id`."""
    return {id(child): path for path, child in module.named_modules()}


@torch.no_grad()
def module_sites(module: nn.Module, inputs: Tensor, n_axes: int) -> list[HookSite]:
    """Run a module once and list the outputs, inputs and patterns of the modules in it, in their order.

    Listed are those whose first axes are the first `n_axes` of `inputs`: (batch, pos) of tokens, or one axis of
    items. Values are not looked at.
    """
    found: dict[str, list[HookSite]] = {}

    def listen(path: str) -> Any:
        def after(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if path not in found:
                found[path] = list(_sites(path, args, kwargs, output, inputs.shape[:n_axes]))

        return after

    handles = [
        child.register_forward_hook(listen(path), with_kwargs=True) for path, child in module.named_modules() if path
    ]
    try:
        module(inputs)
    finally:
        for handle in handles:
            handle.remove()
    return [site for path, _ in module.named_modules() for site in found.get(path, ())]


def _sites(
    path: str, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, axes: torch.Size
) -> Iterator[HookSite]:
    """Yield the hook points of one call of a module."""
    sides: list[tuple[str, Literal["in", "out"], Tensor | None]] = [
        (path, "out", first_tensor(output)),
        (path + INPUT_SUFFIX, "in", module_input(args, kwargs)),
    ]
    for name, side, value in sides:
        if value is not None and value.ndim > len(axes) and value.shape[: len(axes)] == axes:
            yield HookSite(name, tuple(value.shape[len(axes) :]), path, side)
    pattern = output[1] if isinstance(output, tuple) and len(output) > 1 else None
    if isinstance(pattern, Tensor) and pattern.ndim == _PATTERN_DIMS and len(axes) == _PATTERN_DIMS // 2:
        batch, pos = axes
        if pattern.shape == (batch, pattern.shape[1], pos, pos):
            reading = Reading(path, "pattern")
            yield HookSite(path + PATTERN_SUFFIX, (), None, "out", reading, pattern_heads=pattern.shape[1])
