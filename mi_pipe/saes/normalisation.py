"""Centring and scaling of activations, and how both are folded into the trained weights.

x̃ = s (x - μ) with μ the store's exact mean and s = √(d_in / E‖x - μ‖²), so that E‖x̃‖² = d_in. An SAE trained on
x̃ with (W_enc, b_enc, W_dec, b_dec) gives on raw x the same features divided by s, with the same W_enc and W_dec,
b_enc / s, μ + b_dec / s, and thresholds / s. So a saved SAE takes raw activations, and unit decoder rows stay so.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mi_pipe.core.errors import StageError
from mi_pipe.saes.architecture import InferenceRule
from mi_pipe.saes.gradients import Parameters
from mi_pipe.saes.sae import SAE


@dataclass(frozen=True)
class Normaliser:
    """The map from raw to normalised activations of one hook point."""

    mean: Float[Tensor, " d_in"]
    scale: float

    @classmethod
    def from_moments(
        cls, mean: Float[Tensor, " d_in"], mean_square_norm_centred: float, hook: str = ""
    ) -> "Normaliser":
        """Make one from the mean and E‖x - mean‖²; raises StageError if the activations do not vary."""
        if not mean_square_norm_centred > 0 or not math.isfinite(mean_square_norm_centred):
            raise StageError(f"Activations at {hook or 'the hook point'} do not vary; no SAE can be trained on them.")
        return cls(mean.to(torch.float32), math.sqrt(mean.shape[0] / mean_square_norm_centred))

    @property
    def outlier_ratio(self) -> float:
        """‖μ‖ / √(E‖x - μ‖²): large values foretell dead features where activations are not centred."""
        return float(torch.linalg.vector_norm(self.mean)) * self.scale / math.sqrt(self.mean.shape[0])

    def to(self, device: torch.device) -> "Normaliser":
        """Return the same map on another device."""
        return Normaliser(self.mean.to(device), self.scale)

    def __call__(self, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_in"]:
        """Return normalised activations."""
        return (x - self.mean).mul_(self.scale)

    def fold(self, params: Parameters, rule: InferenceRule) -> SAE:
        """Return the SAE on raw activations that equals `params` on normalised ones."""
        if rule.threshold is not None:
            rule = InferenceRule(rule.kind, rule.k, rule.threshold / self.scale)
        return SAE(
            W_enc=params.W_enc.T.contiguous(),
            b_enc=params.b_enc / self.scale,
            W_dec=params.W_dec.clone(),
            b_dec=self.mean + params.b_dec / self.scale,
            rule=rule,
        )
