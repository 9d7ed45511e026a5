"""Gradient ascent of vectors of one norm: Adam (Kingma and Ba 2015) on the sphere, with one second moment a vector.

The gradient's part along a vector changes its norm alone and is taken out. Adam's second moment of each coordinate
would turn a constant gradient v into sign(v), which on a sphere ends elsewhere than at v; one for the whole vector does
not depend on the basis and ends there.
"""

import torch
from jaxtyping import Float
from torch import Tensor

_BETA1, _BETA2 = 0.9, 0.999


class SphereAscent:
    """Vectors on a sphere, moved up a gradient."""

    def __init__(self, vectors: Float[Tensor, "*batch d"], radius: float) -> None:
        """Begin at `vectors`, brought to the norm `radius`."""
        self._radius = radius
        self.vectors = self._on_sphere(vectors)
        self._mean = torch.zeros_like(self.vectors)
        self._square = torch.zeros_like(self.vectors[..., :1])
        self._n_steps = 0

    def step(self, gradient: Float[Tensor, "*batch d"], rate: float) -> None:
        """Move every vector by about `rate` of the radius; one whose gradient has always been 0 stays."""
        self._n_steps += 1
        unit = self.vectors / self._radius
        tangent = gradient - (gradient * unit).sum(-1, keepdim=True) * unit
        self._mean = _BETA1 * self._mean + (1 - _BETA1) * tangent
        self._square = _BETA2 * self._square + (1 - _BETA2) * tangent.square().sum(-1, keepdim=True)
        mean = self._mean / (1 - _BETA1**self._n_steps)
        scale = (self._square / (1 - _BETA2**self._n_steps)).sqrt().clamp_min(torch.finfo(mean.dtype).tiny)
        self.vectors = self._on_sphere(self.vectors + rate * self._radius * mean / scale)

    def _on_sphere(self, vectors: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        return torch.nn.functional.normalize(vectors, dim=-1) * self._radius
