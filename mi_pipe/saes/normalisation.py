"""Centring and scaling of activations, and how both are folded into the trained weights.

x̃ = s (x - μ) with μ the store's exact mean and s = √(d / E‖x - μ‖²), so that E‖x̃‖² = d; activations of several hook
points side by side are scaled each by its own s. For an SAE trained on x̃, with one s for all it reads and writes,
features on raw x are the same divided by s, with the same W_enc and W_dec, b_enc / s, μ + b_dec / s, and thresholds /
s. `fold` has the general case. So a saved SAE takes raw activations.

Decoder rows that are not of norm 1 (standard; a crosscoder's after scaling) are made so where that changes nothing but
the units of the features: z_j ‖W_dec,j‖ for z_j.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from mi_pipe.core.errors import StageError
from mi_pipe.saes.inference import InferenceRule
from mi_pipe.saes.parameters import Parameters
from mi_pipe.saes.sae import SAE

_UNIT_TOLERANCE = 1e-5


@dataclass(frozen=True)
class Normaliser:
    """The map from raw to normalised activations of one hook point, or of several side by side."""

    mean: Float[Tensor, " d"]
    scale: Float[Tensor, " d"]
    """By what each number is multiplied."""

    @classmethod
    def from_moments(cls, mean: Float[Tensor, " d"], mean_square_norm_centred: float, hook: str = "") -> "Normaliser":
        """Make one from the mean and E‖x - mean‖²; raises StageError if the activations do not vary."""
        if not mean_square_norm_centred > 0 or not math.isfinite(mean_square_norm_centred):
            raise StageError(f"Activations at {hook or 'the hook point'} do not vary; no SAE can be trained on them.")
        scale = math.sqrt(mean.shape[0] / mean_square_norm_centred)
        return cls(mean.to(torch.float32), torch.full((mean.shape[0],), scale))

    @classmethod
    def joined(cls, parts: "Sequence[Normaliser]") -> "Normaliser":
        """Return the map of several hook points' activations side by side."""
        return cls(torch.cat([part.mean for part in parts]), torch.cat([part.scale for part in parts]))

    @property
    def uniform_scale(self) -> float | None:
        """The scale, if it is the same everywhere."""
        first = self.scale[0]
        return float(first) if bool((self.scale == first).all()) else None

    @property
    def outlier_ratio(self) -> float:
        """‖μ‖ / √(E‖x - μ‖²): large values foretell dead features where activations are not centred."""
        return float(torch.linalg.vector_norm(self.mean * self.scale)) / math.sqrt(self.mean.shape[0])

    def to(self, device: torch.device) -> "Normaliser":
        """Return the same map on another device."""
        return Normaliser(self.mean.to(device), self.scale.to(device))

    def __call__(self, x: Float[Tensor, "batch d"]) -> Float[Tensor, "batch d"]:
        """Return normalised activations."""
        return (x - self.mean).mul_(self.scale)


def fold(params: Parameters, rule: InferenceRule, read: Normaliser, written: Normaliser) -> SAE:
    """Return the SAE on raw activations that equals `params` on normalised ones.

    `read` is the map of what the encoder reads, `written` that of what the decoder writes (the same for an SAE).
    Features are divided by `written`'s scale c if it has but one, else by c = 1: W_enc ∘ s_read / c, b_enc / c, c W_dec
    / s_written, μ + b_dec / s_written.
    """
    c = written.uniform_scale or 1.0
    is_same = read is written and written.uniform_scale is not None
    W_enc = params.W_enc if is_same else params.W_enc * (read.scale / c)  # noqa: N806
    b_enc = params.b_enc / c
    b_dec = written.mean + params.b_dec / written.scale
    W_skip = params.W_skip  # noqa: N806
    if not params.subtract_b_dec:
        b_enc = b_enc - W_enc @ read.mean
    if W_skip is not None:
        W_skip = W_skip * read.scale / written.scale[:, None]  # noqa: N806
        b_dec = b_dec - W_skip @ read.mean
    W_dec = params.W_dec if written.uniform_scale else params.W_dec / written.scale  # noqa: N806
    rule = rule.scaled(1 / c)
    if rule.kind == "gated" and not params.subtract_b_dec:
        assert rule.b_mag is not None, "a gated rule has it"
        assert rule.r_mag is not None, "a gated rule has it"
        # h is pre - b_enc, and b_enc has just taken up the mean, which magnitudes must do too.
        rule = replace(rule, b_mag=rule.b_mag - rule.r_mag.exp() * (W_enc @ read.mean))
    weights = _with_unit_rows(W_enc, b_enc, W_dec, rule)
    return SAE(
        W_enc=weights[0].T.contiguous(),
        b_enc=weights[1].clone(),
        W_dec=weights[2].clone(),
        b_dec=b_dec,
        rule=weights[3],
        W_skip=W_skip,
        subtract_b_dec=params.subtract_b_dec,
    )


def _with_unit_rows(
    W_enc: Tensor,  # noqa: N803
    b_enc: Tensor,
    W_dec: Tensor,  # noqa: N803
    rule: InferenceRule,
) -> tuple[Tensor, Tensor, Tensor, InferenceRule]:
    """Return the same function with decoder rows of norm 1, where selection does not compare features (not TopK)."""
    norms = torch.linalg.vector_norm(W_dec, dim=1).clamp_min(torch.finfo(W_dec.dtype).tiny)
    if rule.kind == "topk" or bool(((norms - 1).abs() < _UNIT_TOLERANCE).all()):
        return W_enc, b_enc, W_dec, rule
    if rule.kind == "gated":
        assert rule.b_mag is not None, "a gated rule has it"
        assert rule.r_mag is not None, "a gated rule has it"
        rule = replace(rule, r_mag=rule.r_mag + norms.log(), b_mag=rule.b_mag * norms)
        return W_enc, b_enc, W_dec / norms[:, None], rule
    threshold = rule.threshold
    assert threshold is not None, "a threshold rule has one"
    rule = replace(rule, threshold=threshold if not threshold.any() else threshold * norms)
    return W_enc * norms[:, None], b_enc * norms, W_dec / norms[:, None], rule
