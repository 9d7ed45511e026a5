"""MLP probes: standardised activations, one hidden layer of ReLUs, and the outputs of a linear probe.

    minimise  mean loss  +  l2/2 (Σ W1² + Σ W2²)

by Adam on shuffled batches, in float32 from seeded weights (uniform within ±1/√fan-in). The epoch of lowest loss on
validation rows is kept. Numbers are regressed in units of their deviation.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from mi_pipe.probes.config import MLPConfig
from mi_pipe.probes.logistic import negative_log_likelihood
from mi_pipe.probes.ridge import squared_error, standard_target


@dataclass(frozen=True)
class MLP:
    """A trained probe on standardised rows."""

    l2: float
    w1: Float[Tensor, "hidden d"]
    b1: Float[Tensor, " hidden"]
    w2: Float[Tensor, "output hidden"]
    b2: Float[Tensor, " output"]

    def scores(self, x: Float[Tensor, "row d"]) -> Float[Tensor, "row output"]:
        """Return logits, or the predicted number, of standardised rows."""
        return (x.float() @ self.w1.T + self.b1).relu() @ self.w2.T + self.b2


def train_mlp(
    x: dict[str, Float[Tensor, "row d"]],
    y: dict[str, Shaped[Tensor, " row"]],
    n_classes: int,
    l2: float,
    config: MLPConfig,
    seed: int,
) -> MLP:
    """Train on `x["training"]` (standardised) and choose the epoch on `x["validation"]`; no classes: regression."""
    mean, deviation = (torch.zeros(()), torch.ones(())) if n_classes else standard_target(y["training"])
    target = {
        part: y[part] if n_classes else ((y[part] - mean) / deviation).float() for part in ("training", "validation")
    }
    rows = {part: x[part].float() for part in target}
    loss_of = negative_log_likelihood if n_classes else squared_error
    generator = torch.Generator().manual_seed(seed)
    tensors = _first_weights(rows["training"], n_classes, config.hidden, generator)
    adam = torch.optim.Adam(tensors, lr=config.lr)
    best, lowest = tensors, torch.inf
    for _ in range(config.n_epochs):
        order = torch.randperm(len(rows["training"]), generator=generator).to(rows["training"].device)
        for batch in order.split(config.batch_rows):
            adam.zero_grad()
            loss = loss_of(_outputs(rows["training"][batch], tensors), target["training"][batch])
            (loss + l2 / 2 * (tensors[0].square().sum() + tensors[2].square().sum())).backward()
            adam.step()
        with torch.no_grad():
            held = float(loss_of(_outputs(rows["validation"], tensors), target["validation"]))
        if held < lowest:
            best, lowest = [part.detach().clone() for part in tensors], held
    w1, b1, w2, b2 = best
    return MLP(l2, w1, b1, w2 * deviation.to(w2), b2 * deviation.to(b2) + mean.to(b2))


def _outputs(x: Float[Tensor, "row d"], tensors: list[Tensor]) -> Float[Tensor, "row output"]:
    w1, b1, w2, b2 = tensors
    return (x @ w1.T + b1).relu() @ w2.T + b2


def _first_weights(x: Float[Tensor, "row d"], n_classes: int, hidden: int, generator: torch.Generator) -> list[Tensor]:
    n_outputs = n_classes if n_classes > 2 else 1  # noqa: PLR2004
    d = x.shape[1]
    shapes = [((hidden, d), d), ((hidden,), d), ((n_outputs, hidden), hidden), ((n_outputs,), hidden)]
    made = [(2 * torch.rand(*shape, generator=generator) - 1) / fan_in**0.5 for shape, fan_in in shapes]
    return [part.to(x.device).requires_grad_() for part in made]
