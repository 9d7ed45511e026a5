"""Translators of a tuned lens (Belrose et al. 2023, arXiv 2303.08112): an affine map for each depth into the last one.

    tuned lens(h) = final layers(h + W h + b)

W and b start at 0, where the tuned lens is the logit lens. They are trained in units in which every coordinate has the
size of its deviation, z = (h - μ) / σ, as h + σ ∘ (A z + c), so that the few enormous coordinates of a residual stream
set no step sizes; `folded` gives W = diag(σ) A diag(1/σ) and b = σ ∘ c - W μ.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Translator:
    """A trained map for raw residual vectors."""

    weight: Float[Tensor, "d_model d_model"]
    bias: Float[Tensor, " d_model"]

    def __call__(self, residual: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """Return h + W h + b in float32."""
        value = residual.float()
        return value + value @ self.weight.T + self.bias

    def to(self, device: torch.device) -> "Translator":
        """Return it on a device."""
        return Translator(self.weight.to(device), self.bias.to(device))


@dataclass(frozen=True)
class TranslatorInTraining:
    """A and c of one depth, and the units of its residual stream."""

    mean: Float[Tensor, " d_model"]
    deviation: Float[Tensor, " d_model"]
    weight: Float[Tensor, "d_model d_model"]
    bias: Float[Tensor, " d_model"]

    @classmethod
    def identity(cls, mean: Float[Tensor, " d_model"], deviation: Float[Tensor, " d_model"]) -> "TranslatorInTraining":
        """Return one that changes nothing; coordinates that never vary are left alone."""
        safe = torch.where(deviation > 0, deviation, torch.ones_like(deviation))
        zeros = torch.zeros(len(mean), len(mean), device=mean.device)
        return cls(mean, safe, zeros.requires_grad_(), torch.zeros_like(mean).requires_grad_())

    @property
    def parameters(self) -> list[Tensor]:
        """What is trained."""
        return [self.weight, self.bias]

    def __call__(self, residual: Float[Tensor, "row d_model"]) -> Float[Tensor, "row d_model"]:
        """Return h + σ ∘ (A z + c)."""
        units = (residual - self.mean) / self.deviation
        return residual + self.deviation * (units @ self.weight.T + self.bias)

    def folded(self, weight: Float[Tensor, "d_model d_model"], bias: Float[Tensor, " d_model"]) -> Translator:
        """Return the translator for raw vectors with this A and c; folded in float64."""
        mean, deviation = self.mean.double(), self.deviation.double()
        raw = deviation[:, None] * weight.detach().double() / deviation[None, :]
        return Translator(raw.float(), (deviation * bias.detach().double() - raw @ mean).float())
