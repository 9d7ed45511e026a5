"""How parameters move: Adam with a schedule, a clipped gradient, and mostly a decoder that keeps rows of norm 1.

Steps of one update: project each decoder row's gradient orthogonal to the row (a step along it would only be undone
by the normalisation), clip the norm of all gradients together, Adam (fused), rescale decoder rows to norm 1.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from mi_pipe.saes.parameters import Parameters, unit_rows_

_REFERENCE_LR = 2e-4
_REFERENCE_WIDTH = 2**14
_REFERENCE_STEPS = 2**13
_LARGEST_LR = 5e-3
_BETAS = (0.9, 0.999)


def default_lr(d_sae: int, n_steps: int) -> float:
    """Return 2e-4 / √(d_sae / 2^14), times √(2^13 / n_steps) where a training has fewer than 2^13 steps; at most 5e-3.

    The first factor is the rule of Gao et al. 2024 as sparsify and dictionary_learning use it, made for long trainings;
    in a few hundred steps weights do not get far at that rate (docs/saes.md has the measurements).

    >>> default_lr(2**14, 100_000), default_lr(2**14, 2**11)
    (0.0002, 0.0004)
    """
    factor = max(1.0, math.sqrt(_REFERENCE_STEPS / n_steps))
    return min(_LARGEST_LR, factor * _REFERENCE_LR / math.sqrt(d_sae / _REFERENCE_WIDTH))


@dataclass(frozen=True)
class Schedule:
    """Learning rate by step: linear warm-up, constant, linear decay to zero at the end."""

    peak: float
    n_steps: int
    warmup_steps: int
    decay_steps: int

    @classmethod
    def of_budget(
        cls, peak: float, n_steps: int, warmup_steps: int, warmup_fraction: float, decay_fraction: float
    ) -> "Schedule":
        """Warm up for `warmup_steps`, or a fraction of all steps where that is less."""
        warmup = min(warmup_steps, int(warmup_fraction * n_steps))
        return cls(peak, n_steps, warmup, int(decay_fraction * n_steps))

    def lr(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        rise = (step + 1) / self.warmup_steps if step < self.warmup_steps else 1.0
        left = self.n_steps - step
        fall = left / self.decay_steps if left < self.decay_steps else 1.0
        return self.peak * min(rise, fall)


class Optimiser:
    """Adam over one SAE's parameters."""

    def __init__(
        self,
        params: Parameters,
        schedule: Schedule,
        clip_norm: float,
        has_unit_decoder: bool = True,
        lr_factors: Mapping[str, float] | None = None,
    ) -> None:
        """Start with zero moments; `lr_factors` multiply the learning rate of parameters by name."""
        self._params = params
        self._schedule = schedule
        self._clip_norm = clip_norm
        self._has_unit_decoder = has_unit_decoder
        factors = lr_factors or {}
        groups = [
            {"params": [value], "lr": schedule.peak, "factor": factors.get(name, 1.0)}
            for name, value in params.named().items()
        ]
        self._adam = torch.optim.Adam(groups, lr=schedule.peak, betas=_BETAS, fused=True)

    def step(self, gradients: Parameters, step: int) -> tuple[float, float]:
        """Update the parameters in place; return the gradients' norm before clipping, and the learning rate."""
        W_dec = self._params.W_dec  # noqa: N806 (the field's name)
        if self._has_unit_decoder:
            along = torch.linalg.vecdot(gradients.W_dec, W_dec)
            gradients.W_dec.addcmul_(along[:, None], W_dec, value=-1)
        grads = list(gradients.named().values())
        norm = float(torch.nn.utils.get_total_norm(grads))
        if norm > self._clip_norm:
            for grad in grads:
                grad.mul_(self._clip_norm / norm)
        lr = self._schedule.lr(step)
        for group in self._adam.param_groups:
            group["lr"] = lr * group["factor"]
        for param, grad in zip(self._params.named().values(), grads, strict=True):
            param.grad = grad
        self._adam.step()
        self._adam.zero_grad()
        if self._has_unit_decoder:
            unit_rows_(W_dec)
        return norm, lr

    def forget(self, features: Int[Tensor, " feature"]) -> None:
        """Set the moments of some features to zero: their weights were replaced."""
        d_sae = self._params.d_sae
        for param in self._params.named().values():
            if param.shape[0] == d_sae and param in self._adam.state:
                for key in ("exp_avg", "exp_avg_sq"):
                    self._adam.state[param][key][features] = 0

    def state(self) -> dict[str, Tensor]:
        """Return the moments and step counts by name."""
        return {
            f"{name}.{key}": self._adam.state[param][key]
            for name, param in self._params.named().items()
            for key in ("exp_avg", "exp_avg_sq", "step")
            if param in self._adam.state
        }

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Go on from saved moments."""
        for name, param in self._params.named().items():
            self._adam.state[param] = {
                key: state[f"{name}.{key}"].to(param.device).clone() for key in ("step", "exp_avg", "exp_avg_sq")
            }
