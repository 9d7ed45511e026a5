"""Fitting one probe: a path of penalties on training rows, the choice on validation rows, the figures on test rows."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from mi_pipe.probes.basis import Basis, fit_basis
from mi_pipe.probes.config import ProbeKind, ProbeOptions
from mi_pipe.probes.logistic import Solution, negative_log_likelihood, solve_logistic
from mi_pipe.probes.mlp import train_mlp
from mi_pipe.probes.ridge import solve_ridge, squared_error
from mi_pipe.probes.scores import NO_SCORE, Score, accuracy, auc, r_squared

PART_NAMES = ("training", "validation", "test")
Rows = dict[str, Float[Tensor, "row d"]]
Targets = dict[str, Shaped[np.ndarray, " row"]]


@dataclass(frozen=True)
class Readable:
    """Activations of some rows by part, and the basis of the training rows; shared by all fits on them."""

    x: Rows
    """Standardised, float64."""
    z: Rows
    """On the principal axes."""
    basis: Basis

    @classmethod
    def of(cls, x: Rows) -> "Readable":
        """Standardise and turn raw activations."""
        basis = fit_basis(x["training"])
        standard = {part: basis.standardised(rows) for part, rows in x.items()}
        return cls(standard, {part: rows @ basis.axes for part, rows in standard.items()}, basis)


@dataclass(frozen=True)
class Fitted:
    """A probe of one kind, with what it was chosen by and how it does."""

    l2: float
    curve: list[dict[str, float]]
    """Of each penalty: l2, and mean loss on training and validation rows (nats, or squared error)."""
    tensors: dict[str, Tensor]
    """For raw activations: weight, bias; or w1, b1, w2, b2. float32."""
    scores: dict[str, Float[np.ndarray, "row output"]]
    """Logits, or predicted numbers, by part."""


@dataclass(frozen=True)
class Figures:
    """Figures of a probe: accuracy or R² (`main`) by part, and AUC on test rows."""

    training: Score
    validation: Score
    test: Score
    auc: Score


def fit_probe(kind: ProbeKind, data: Readable, y: Targets, n_classes: int, options: ProbeOptions) -> Fitted:
    """Fit a probe of classes, or of a number if `n_classes` is 0."""
    target = {part: torch.from_numpy(values).to(data.basis.mean.device) for part, values in y.items()}
    loss_of = negative_log_likelihood if n_classes else squared_error
    if kind == "linear":
        found: list[Any] = _linear(data, target["training"], n_classes, options)
        inputs = data.z
    else:
        found = [train_mlp(data.x, target, n_classes, l2, options.mlp, options.seed) for l2 in options.mlp.l2]
        inputs = data.x
    curve, losses = [], []
    for item in found:
        with torch.no_grad():
            loss = {part: float(loss_of(item.scores(inputs[part]), target[part])) for part in PART_NAMES[:2]}
        curve.append({"l2": item.l2, **loss})
        losses.append(loss["validation"])
    best = found[int(np.argmin(losses))]
    with torch.no_grad():
        scores = {part: best.scores(rows).cpu().double().numpy() for part, rows in inputs.items()}
    return Fitted(best.l2, sorted(curve, key=lambda row: row["l2"]), _raw(best, data.basis), scores)


def _linear(data: Readable, y: Tensor, n_classes: int, options: ProbeOptions) -> list[Solution]:
    variance = data.basis.variance
    if n_classes:
        return solve_logistic(data.z["training"], y, n_classes, options.l2, variance)
    return solve_ridge(data.z["training"], y, options.l2, variance)


def _raw(probe: Any, basis: Basis) -> dict[str, Tensor]:
    """Return the probe's tensors for raw activations."""
    if isinstance(probe, Solution):
        weight, bias = basis.unfold(probe.weight, probe.bias)
        return {"weight": weight.float().cpu(), "bias": bias.float().cpu()}
    w1 = probe.w1.double() / basis.scale
    b1 = probe.b1.double() - w1 @ basis.mean
    found = {"w1": w1, "b1": b1, "w2": probe.w2, "b2": probe.b2}
    return {name: value.float().cpu() for name, value in found.items()}


def figures_of(fitted: Fitted, y: Targets, n_classes: int, cluster: dict[str, Int[np.ndarray, " row"]]) -> Figures:
    """Return accuracy or R² by part with intervals by prompt, and the AUC on test rows."""

    def main(part: str) -> Score:
        if n_classes:
            return accuracy(fitted.scores[part], y[part], cluster[part])
        return r_squared(fitted.scores[part][:, 0], y[part], cluster[part])

    area = auc(fitted.scores["test"], y["test"], cluster["test"]) if n_classes else NO_SCORE
    return Figures(*(main(part) for part in PART_NAMES), auc=area)
