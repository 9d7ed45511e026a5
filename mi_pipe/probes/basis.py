"""The space that linear probes are fitted in: activations standardised, and turned to their principal axes.

Every coordinate is centred and divided by its deviation over the training rows, so that one penalty means the same in
all of them. A penalty Σ w² does not care for rotations, so the axes can be those in which the covariance is diagonal:
no solution has a part outside the span of the rows, and there are at most min(n, d) axes. float64 throughout.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

_SMALLEST = 1e-12
"""Axes whose variance is below this share of the largest are rounding."""


@dataclass(frozen=True)
class Basis:
    """Standardisation and principal axes of training rows."""

    mean: Float[Tensor, " d"]
    scale: Float[Tensor, " d"]
    """Deviation of each coordinate; 1 where it never varies."""
    axes: Float[Tensor, "d axis"]
    variance: Float[Tensor, " axis"]
    """Of the standardised training rows along each axis."""

    def coordinates(self, x: Float[Tensor, "row d"]) -> Float[Tensor, "row axis"]:
        """Return rows in the basis."""
        return self.standardised(x) @ self.axes

    def standardised(self, x: Float[Tensor, "row d"]) -> Float[Tensor, "row d"]:
        """Return centred and scaled rows, float64."""
        return (x.double() - self.mean) / self.scale

    def unfold(
        self, weight: Float[Tensor, "output axis"], bias: Float[Tensor, " output"]
    ) -> tuple[Float[Tensor, "output d"], Float[Tensor, " output"]]:
        """Return weights and biases that give the same from raw activations."""
        raw = (weight @ self.axes.T) / self.scale
        return raw, bias - raw @ self.mean


def fit_basis(x: Float[Tensor, "row d"]) -> Basis:
    """Return the basis of training rows."""
    rows = x.double()
    mean = rows.mean(0)
    deviation = rows.std(0, correction=0)
    scale = torch.where(deviation > 0, deviation, torch.ones_like(deviation))
    standard = (rows - mean) / scale
    variance, axes = torch.linalg.eigh(standard.T @ standard / len(rows))
    kept = variance > _SMALLEST * variance.max()
    return Basis(mean, scale, axes[:, kept], variance[kept])
