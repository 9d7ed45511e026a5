"""Many SAEs of one hook point trained on one pass over its activations.

Each batch is fetched and normalised once and goes to every SAE in turn. Nothing passes between SAEs, so each comes out
as if it had been trained alone. Between intervals of `log_steps` there is no state but that of the trainers: a
checkpoint there is complete.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mi_pipe.core.errors import StageError
from mi_pipe.saes.metrics import Moments, wide_dtype
from mi_pipe.saes.normalisation import Normaliser
from mi_pipe.saes.sae import SAE
from mi_pipe.saes.trainer import SAETrainer, StepFigures

CURVE_COLUMNS = ("sae", "step", "tokens", "loss", "fvu", "l0", "dead_fraction", "grad_norm", "lr")


@dataclass(frozen=True)
class Interval:
    """Progress at the end of an interval: steps done so far, and a row of the training curve for each SAE."""

    n_steps_done: int
    rows: list[dict[str, Any]]


@dataclass
class _Totals:
    """Sums over an interval, for one SAE."""

    loss: Tensor
    squared_error: Tensor
    n_active: Tensor
    grad_norm: float = 0.0
    lr: float = 0.0

    @classmethod
    def empty(cls, device: torch.device) -> "_Totals":
        dtype = wide_dtype(device)
        loss, squared_error = (torch.zeros((), dtype=dtype, device=device) for _ in range(2))
        return cls(loss, squared_error, torch.zeros((), dtype=torch.int64, device=device))

    def add(self, figures: StepFigures) -> None:
        self.loss += figures.loss
        self.squared_error += figures.squared_error
        self.n_active += figures.n_active
        self.grad_norm += figures.grad_norm
        self.lr = figures.lr


class TrainingGroup:
    """The SAEs that share a pass."""

    def __init__(self, normaliser: Normaliser, trainers: dict[str, SAETrainer]) -> None:
        """Train `trainers` (by name, all on one device) on activations that `normaliser` maps."""
        self.device = next(iter(trainers.values())).params.device
        self.normaliser = normaliser.to(self.device)
        self.trainers = trainers

    def train(
        self, batches: Iterator[Float[Tensor, "batch d_in"]], first_step: int, n_steps: int, log_steps: int
    ) -> Iterator[Interval]:
        """Train on raw batches for steps `first_step` to `n_steps`.

        Yields after each multiple of `log_steps` and at the end; raises StageError when a loss is not finite.
        """
        start = first_step
        while start < n_steps:
            stop = min(n_steps, (start // log_steps + 1) * log_steps)
            yield Interval(stop, self._interval(itertools.islice(batches, stop - start), start, stop))
            start = stop

    def _interval(self, batches: Iterator[Tensor], start: int, stop: int) -> list[dict[str, Any]]:
        moments = Moments(self.normaliser.mean.shape[0], self.device)
        totals = {name: _Totals.empty(self.device) for name in self.trainers}
        for step, raw in zip(range(start, stop), batches, strict=True):
            x = self.normaliser(raw.to(self.device, torch.float32))
            moments.update(x)
            for name, trainer in self.trainers.items():
                totals[name].add(trainer.step(x, step))
        return self._rows(start, stop, moments, totals)

    def folded(self) -> dict[str, SAE]:
        """Return each SAE as it is now, on raw activations, on the CPU."""
        return {
            name: self.normaliser.fold(trainer.params, trainer.architecture.rule()).to("cpu")
            for name, trainer in self.trainers.items()
        }

    def state(self) -> dict[str, Tensor]:
        """Return the state of all trainers, names `<sae>/<tensor>`."""
        return {f"{name}/{key}": value for name, it in self.trainers.items() for key, value in it.state().items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Go on from `state`."""
        for name, trainer in self.trainers.items():
            prefix = f"{name}/"
            trainer.load_state({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})

    def _rows(self, start: int, stop: int, moments: Moments, totals: dict[str, _Totals]) -> list[dict[str, Any]]:
        n_steps = stop - start
        variance = float(moments.centred_square())
        rows: list[dict[str, Any]] = []
        for name, total in totals.items():
            loss = float(total.loss) / n_steps
            if not math.isfinite(loss):
                raise StageError(
                    f"The loss of {name} is {loss} by step {stop:,}. "
                    "Lower the learning rate (optimisation.lr), or look for non-finite activations in the store."
                )
            rows.append(
                {
                    "sae": name,
                    "step": stop,
                    "tokens": stop * (moments.n_rows // n_steps),
                    "loss": loss,
                    "fvu": float(total.squared_error) / variance,
                    "l0": int(total.n_active) / moments.n_rows,
                    "dead_fraction": self.trainers[name].dead_fraction,
                    "grad_norm": total.grad_norm / n_steps,
                    "lr": total.lr,
                }
            )
        return rows
