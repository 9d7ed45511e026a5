"""Logistic regression for a path of penalties, to the optimum.

    minimise  mean of -log p(y | z)  +  l2/2 Σ w²        (biases free)

p is a sigmoid for two classes and a softmax over one weight vector a class for more: scikit-learn's objective with C
= 1 / (n l2). Solved by L-BFGS in float64 with a strong Wolfe line search, in variables v = w √(variance/4 + l2):
there the Hessian is nearly the identity (p (1 - p) ≤ 1/4), so that a few dozen iterations reach the optimum whatever
the penalty. The strongest penalty comes first; each solution starts from the one before.

It is written here with torch, not taken from scikit-learn, so that it runs where the activations are (a GPU too) and
brings no further dependency; the tests compare it with scikit-learn's.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

_MOST_STEPS = 300
_HISTORY = 20
_GRADIENT = 1e-8
_CHANGE = 1e-14


@dataclass(frozen=True)
class Solution:
    """Weights on the axes of a basis, and biases: one output for two classes and for a number, else one a class."""

    l2: float
    weight: Float[Tensor, "output axis"]
    bias: Float[Tensor, " output"]

    def scores(self, z: Float[Tensor, "row axis"]) -> Float[Tensor, "row output"]:
        """Return logits, or the predicted number."""
        return z @ self.weight.T + self.bias


def negative_log_likelihood(scores: Float[Tensor, "row output"], y: Int[Tensor, " row"]) -> Float[Tensor, ""]:
    """Return the mean of -log p(y), in nats."""
    if scores.shape[1] == 1:
        return functional.binary_cross_entropy_with_logits(scores.squeeze(1), y.to(scores.dtype))
    return functional.cross_entropy(scores, y)


def solve_logistic(
    z: Float[Tensor, "row axis"],
    y: Int[Tensor, " row"],
    n_classes: int,
    penalties: tuple[float, ...],
    variance: Float[Tensor, " axis"],
) -> list[Solution]:
    """Return the solutions, strongest penalty first; classes are numbered from 0."""
    n_outputs = 1 if n_classes == 2 else n_classes  # noqa: PLR2004
    weight = torch.zeros(n_outputs, z.shape[1], dtype=torch.float64, device=z.device)
    bias = torch.zeros(n_outputs, dtype=torch.float64, device=z.device)
    found: list[Solution] = []
    for l2 in sorted(penalties, reverse=True):
        weight, bias = _solve(z, y, l2, (variance / 4 + l2).sqrt(), (weight, bias))
        found.append(Solution(l2, weight, bias))
    return found


def _solve(
    z: Float[Tensor, "row axis"],
    y: Int[Tensor, " row"],
    l2: float,
    curvature: Float[Tensor, " axis"],
    start: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor]:
    scaled = (start[0] * curvature).requires_grad_()
    bias = start[1].clone().requires_grad_()
    solver = torch.optim.LBFGS(
        [scaled, bias],
        max_iter=_MOST_STEPS,
        max_eval=2 * _MOST_STEPS,
        history_size=_HISTORY,
        tolerance_grad=_GRADIENT,
        tolerance_change=_CHANGE,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        solver.zero_grad()
        weight = scaled / curvature
        value = negative_log_likelihood(z @ weight.T + bias, y) + l2 / 2 * weight.square().sum()
        value.backward()
        return value

    solver.step(loss)
    return (scaled.detach() / curvature), bias.detach()
