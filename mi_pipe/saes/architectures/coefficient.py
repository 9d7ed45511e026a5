"""The weight of a sparsity penalty: fixed, or led so that the number of active features comes to a target.

A penalty's coefficient decides L0 only by way of model, layer and width, so that sweeps over it have to be repeated for
every model. With a target the coefficient follows log λ ← log λ + rate * clip(e + τ de, -1, 1) after each step, with
e = log(L0 / target) and de the running mean of its change a step: L0 answers a new λ late, as weights have to move
first, and without the look ahead over τ steps λ swings past what is needed. Both kinds rise linearly from 0 over the
sparsity warm-up.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_RATE = 0.02
_LOOK_AHEAD_STEPS = 40
_MEMORY = 0.9
"""Decay of the running mean of changes."""
_LEAST_L0 = 1e-3


@dataclass(frozen=True)
class Sparsity:
    """How sparse a penalised architecture is to become."""

    target_l0: float | None = None
    """Active features a row to come to; None with a fixed coefficient."""
    coefficient: float | None = None
    """A fixed coefficient; None to be led to the target."""
    warmup_steps: int = 0
    """Steps over which the coefficient rises to its full value."""


class Coefficient:
    """The coefficient as training goes on."""

    def __init__(self, sparsity: Sparsity, start: float) -> None:
        """Begin at the fixed coefficient, or at `start`; raises ValueError without coefficient and target."""
        if sparsity.coefficient is None and sparsity.target_l0 is None:
            raise ValueError("a penalty needs a coefficient or a target")
        self._sparsity = sparsity
        first = start if sparsity.coefficient is None else sparsity.coefficient
        self._value = torch.tensor(first, dtype=torch.float64)
        self._last = torch.tensor(math.inf, dtype=torch.float64)
        self._change = torch.zeros((), dtype=torch.float64)

    @property
    def is_led(self) -> bool:
        """Whether it follows a target."""
        return self._sparsity.coefficient is None

    def begin(self, value: float) -> None:
        """Begin at a value, if this is led to a target and the value is above 0."""
        if self.is_led and value > 0:
            self._value.fill_(value)

    def at(self, step: int) -> float:
        """Return the coefficient of a step counted from 0."""
        return float(self._value) * min(1.0, (step + 1) / max(1, self._sparsity.warmup_steps))

    def observe(self, l0: float) -> None:
        """Follow the target, given the active features a row of the last step."""
        if self.is_led and self._sparsity.target_l0 is not None:
            error = math.log(max(l0, _LEAST_L0) / self._sparsity.target_l0)
            change = 0.0 if torch.isinf(self._last) else error - float(self._last)
            self._change.mul_(_MEMORY).add_((1 - _MEMORY) * change)
            self._last.fill_(error)
            aim = error + _LOOK_AHEAD_STEPS * float(self._change)
            self._value *= math.exp(_RATE * max(-1.0, min(1.0, aim)))

    def rescale(self, factor: float) -> None:
        """Multiply the coefficient, when the penalty itself has changed."""
        self._value *= factor

    def state(self) -> dict[str, Tensor]:
        """Return what a checkpoint must hold."""
        return {"coefficient": self._value, "last_error": self._last, "change": self._change}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Go on from a checkpoint's state."""
        self._value = state["coefficient"].clone()
        self._last = state["last_error"].clone()
        self._change = state["change"].clone()
