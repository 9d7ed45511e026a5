"""Replaces values while a plain model runs: at hook points, columns of fused projections, whole outputs of modules."""

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mi_pipe.models.model import Edit, Model
from mi_pipe.models.reading import Columns


@contextmanager
def edited(model: Model, hook: str, edit: Edit) -> Generator[None]:
    """Within the block, replace the value at a hook point, which may be some columns of a fused projection."""
    site = model.hooks[hook]
    if site.module_path is not None or site.derived is None or not isinstance(site.derived.rule, Columns):
        with model.edited({hook: edit}):
            yield
        return
    columns = torch.tensor(site.derived.rule.indices, device=model.device)

    def after(_module: nn.Module, _args: Any, output: Tensor) -> Tensor | None:
        new = edit(output[..., columns])
        return None if new is None else output.index_copy(-1, columns, new)

    handle = model.submodule(site.derived.module_path).register_forward_hook(after)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def forced(outputs: Mapping[nn.Module, Any]) -> Generator[None]:
    """Within the block, let modules return these values without computing anything."""
    before = {module: module.__dict__.get("forward") for module in outputs}
    for module, value in outputs.items():
        module.forward = lambda *_args, _value=value, **_kwargs: _value
    try:
        yield
    finally:
        for module, forward in before.items():
            del module.forward
            if forward is not None:
                module.forward = forward


@contextmanager
def last_position_only(module: nn.Module) -> Generator[None]:
    """Within the block, give a module only the last position of its input."""

    def cut(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0][:, -1:], *args[1:])

    handle = module.register_forward_pre_hook(cut)
    try:
        yield
    finally:
        handle.remove()
