"""Ridge regression for a path of penalties, in closed form.

    minimise  mean of (y - w·z - b)² / 2  +  l2/2 Σ w²

In a basis whose axes are uncorrelated every weight is for itself: w_j = cov(z_j, y) / (variance_j + l2), and b the mean
of y. scikit-learn's alpha is n l2.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from mi_pipe.probes.logistic import Solution


def solve_ridge(
    z: Float[Tensor, "row axis"],
    y: Float[Tensor, " row"],
    penalties: tuple[float, ...],
    variance: Float[Tensor, " axis"],
) -> list[Solution]:
    """Return the solutions, strongest penalty first; `z` are centred training rows in their own basis."""
    covariance = z.T @ (y - y.mean()) / len(y)
    bias = y.mean()[None]
    return [Solution(l2, (covariance / (variance + l2))[None], bias) for l2 in sorted(penalties, reverse=True)]


def squared_error(scores: Float[Tensor, "row 1"], y: Float[Tensor, " row"]) -> Float[Tensor, ""]:
    """Return the mean squared error."""
    return (scores.squeeze(1) - y).square().mean()


def standard_target(y: Float[Tensor, " row"]) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Return mean and deviation of a target, 1 if it never varies."""
    deviation = y.std(correction=0)
    return y.mean(), torch.where(deviation > 0, deviation, torch.ones_like(deviation))
