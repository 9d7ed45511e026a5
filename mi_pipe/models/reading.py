"""How the value of a hook point is had from one of the plain model's own modules, without the bridge.

Most hook points are just a module's input or output. The rest of what is commonly stored follows from one by a rule
that is fixed when the hook points are listed: q, k and v are columns of a fused projection, a normalised input is
computed from the norm's input as TransformerLens computes it, learned position embeddings lack the batch axis, and
attention patterns are what an attention module returns beside its output when attention is computed step by step.
"""

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn

Side = Literal["in", "out", "pattern"]


class Rule(Protocol):
    """What is done with a module's value to have the hook point's."""

    def __call__(self, value: Tensor) -> Tensor:
        """Return the hook point's value; the module's own stays as it is."""
        ...


@dataclass(frozen=True)
class Normalized:
    """The normalised input of a LayerNorm or RMSNorm before its weights, or the scale it was divided by."""

    eps: float
    is_centred: bool
    """LayerNorm takes the mean away first, RMSNorm does not."""
    is_scale: bool = False

    def __call__(self, value: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos width"]:
        """Return (x - mean) / sqrt(variance + eps), or sqrt(variance + eps), in float32 at least."""
        exact = value if value.dtype == torch.float64 else value.float()
        if self.is_centred:
            exact = exact - exact.mean(-1, keepdim=True)
        variance = exact.square().mean(-1, keepdim=True) + self.eps
        return variance.sqrt() if self.is_scale else exact * variance.rsqrt()


@dataclass(frozen=True)
class Columns:
    """Some columns of a projection that computes several things at once, in this order."""

    indices: tuple[int, ...]

    def __call__(self, value: Float[Tensor, "*batch fused"]) -> Float[Tensor, "*batch width"]:
        """Return the columns: a view if they lie beside each other, else a copy."""
        first, n_columns = self.indices[0], len(self.indices)
        if self.indices == tuple(range(first, first + n_columns)):
            return value[..., first : first + n_columns]
        return value[..., torch.tensor(self.indices, device=value.device)]


@dataclass(frozen=True)
class Reading:
    """Where a value comes from: a module, its side, and a rule if the value is not just that."""

    module_path: str
    side: Side
    rule: Rule | None = None

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Tensor | None:
        """Return the value from what a module was given and what it returned, or None if it is not there."""
        if self.side == "in":
            value = module_input(args, kwargs)
        elif self.side == "pattern":
            # Rows of the store are query tokens: (batch, head, query, key) becomes (batch, query, head, key).
            value = None if output[1] is None else output[1].transpose(1, 2)
        else:
            value = first_tensor(output)
        return self.rule(value) if self.rule and value is not None else value


def module_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Return the tensor that a module works on: its first argument, or the one that transformers calls so."""
    found = first_tensor(args)
    return first_tensor(kwargs.get("hidden_states", list(kwargs.values()))) if found is None else found


def first_tensor(value: Any) -> Tensor | None:
    """Return the first tensor of what a module takes or returns (tensor, tuple, list, dict or model output)."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, dict):
        return first_tensor(list(value.values()))
    if isinstance(value, tuple | list):
        return next((found for item in value if (found := first_tensor(item)) is not None), None)
    return None


class Listener(Protocol):
    """Is given each value as it appears."""

    def __call__(self, name: str, value: Tensor) -> None:
        """Take the value of a hook point; it is the model's own tensor and may change afterwards."""
        ...


@contextmanager
def listening(module: nn.Module, readings: dict[str, Reading], listener: Listener) -> Generator[None]:
    """Within the block, hand each named value to `listener` whenever the module computes it."""
    handles = [_register(module, name, reading, listener) for name, reading in readings.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _register(module: nn.Module, name: str, reading: Reading, listener: Listener) -> Any:
    part = module.get_submodule(reading.module_path)
    if reading.side == "in":

        def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            _pass_on(listener, name, reading(args, kwargs, None))

        return part.register_forward_pre_hook(before, with_kwargs=True)

    def after(_module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        _pass_on(listener, name, reading(args, {}, output))

    return part.register_forward_hook(after)


def _pass_on(listener: Listener, name: str, value: Tensor | None) -> None:
    if value is not None:
        listener(name, value)
