"""Many SAEs of the same hook points trained on one pass over their activations.

Each batch is fetched and normalised once and goes to every SAE in turn. Nothing passes between SAEs, so each comes out
as if it had been trained alone. After any step, the state of the trainers and the sums of the interval under way are
all there is: a checkpoint there is complete.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mi_pipe.core.errors import StageError
from mi_pipe.saes.held_out import side_by_side
from mi_pipe.saes.metrics import Moments, wide_dtype
from mi_pipe.saes.normalisation import Normaliser, fold
from mi_pipe.saes.sae import SAE
from mi_pipe.saes.sites import Sites
from mi_pipe.saes.step import Batch
from mi_pipe.saes.trainer import SAETrainer, StepFigures, below

LOSS_PARTS = ("reconstruction", "sparsity", "gate", "auxk", "revival")
CURVE_COLUMNS = (
    *("sae", "step", "tokens", "loss", *LOSS_PARTS),
    *("fvu", "l0", "dead_fraction", "dense_fraction", "grad_norm", "lr", "coefficient", "threshold"),
)
_DENSE_SHARE = 0.1


@dataclass
class IntervalSums:
    """Sums over the steps of an interval, for one SAE."""

    losses: dict[str, Tensor]
    squared_error: Tensor
    n_active: Tensor
    n_fired: Tensor
    grad_norm: Tensor

    @classmethod
    def empty(cls, d_sae: int, device: torch.device) -> "IntervalSums":
        """Begin with zeros."""
        wide = wide_dtype(device)
        losses = {name: torch.zeros((), dtype=wide, device=device) for name in LOSS_PARTS}
        return cls(
            losses,
            squared_error=torch.zeros((), dtype=wide, device=device),
            n_active=torch.zeros((), dtype=torch.int64, device=device),
            n_fired=torch.zeros(d_sae, dtype=torch.int64, device=device),
            grad_norm=torch.zeros((), dtype=torch.float64),
        )

    def add(self, figures: StepFigures) -> None:
        """Add a step."""
        for name, value in figures.losses.items():
            self.losses[name] += value
        self.squared_error += figures.squared_error
        self.n_active += figures.n_active
        self.n_fired += figures.n_fired
        self.grad_norm += figures.grad_norm

    def state(self) -> dict[str, Tensor]:
        """Return the sums by name."""
        named = {name: getattr(self, name) for name in ("squared_error", "n_active", "n_fired", "grad_norm")}
        return {**named, **{f"loss.{name}": value for name, value in self.losses.items()}}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from saved sums."""
        for name, value in self.state().items():
            value.copy_(state[name])


class TrainingGroup:
    """The SAEs that share a pass."""

    def __init__(
        self, sites: Sites, normalisers: Mapping[str, Normaliser], trainers: dict[str, SAETrainer], log_steps: int
    ) -> None:
        """Train `trainers` (by name, all on one device) on hook points that `normalisers` map, by hook point.

        Every `log_steps` steps there is a row of the training curve for each.
        """
        self.device = next(iter(trainers.values())).params.device
        self.trainers = trainers
        self._sites = sites
        self._read, self._written = _joined(normalisers, sites.inputs), _joined(normalisers, sites.outputs)
        self._read = self._read.to(self.device)
        self._written = self._read if sites.inputs == sites.outputs else self._written.to(self.device)
        self._log_steps = log_steps
        self._restart()

    def _restart(self) -> None:
        self._n_steps = 0
        self._moments = Moments(self._written.mean.shape[0], self.device)
        self._sums = {name: IntervalSums.empty(it.params.d_sae, self.device) for name, it in self.trainers.items()}

    def step(self, taken: Mapping[str, Float[Tensor, "batch width"]], step: int) -> list[dict[str, Any]]:
        """Take one step on raw activations by hook point; return rows of the curve, if an interval is full.

        Raises StageError when a loss is not finite.
        """
        raw = side_by_side({hook: value.to(self.device, torch.float32) for hook, value in taken.items()}, self._sites)
        x = self._read(raw.x)
        batch = Batch(x, x if raw.target is raw.x else self._written(raw.target))
        self._moments.update(batch.target)
        for name, trainer in self.trainers.items():
            self._sums[name].add(trainer.step(batch, step))
        self._n_steps += 1
        if (step + 1) % self._log_steps:
            return []
        return self.rows(step + 1)

    def rows(self, n_steps_done: int) -> list[dict[str, Any]]:
        """Return a row of the curve for each SAE over the steps since the last, and begin the next interval."""
        if not self._n_steps:
            return []
        variance = float(self._moments.centred_square())
        rows = [self._row(name, sums, n_steps_done, variance) for name, sums in self._sums.items()]
        self._restart()
        return rows

    def folded(self) -> Iterator[tuple[str, SAE]]:
        """Iterate over the SAEs as they are now, on raw activations, on the CPU."""
        for name, trainer in self.trainers.items():
            params, rule = trainer.result()
            yield name, fold(params, rule, self._read, self._written).to("cpu")

    def state(self) -> dict[str, Tensor]:
        """Return the state of all trainers and of the interval under way, names `<sae>/<tensor>`."""
        trainers = {f"{name}/{key}": value for name, it in self.trainers.items() for key, value in it.state().items()}
        sums = {f"{name}/interval.{key}": v for name, sums in self._sums.items() for key, v in sums.state().items()}
        moments = {f"interval/{key}": value for key, value in self._moments.state().items()}
        return {**trainers, **sums, **moments, "interval/n_steps": torch.tensor(self._n_steps)}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Go on from `state`."""
        self._moments.load_state(below(state, "interval/"))
        self._n_steps = int(state["interval/n_steps"])
        for name, trainer in self.trainers.items():
            mine = below(state, f"{name}/")
            trainer.load_state(mine)
            self._sums[name].load_state(below(mine, "interval."))

    def _row(self, name: str, sums: IntervalSums, n_steps_done: int, variance: float) -> dict[str, Any]:
        n, n_rows = self._n_steps, self._moments.n_rows
        losses = {part: float(value) / n for part, value in sums.losses.items()}
        loss = sum(losses.values())
        if not math.isfinite(loss):
            raise StageError(
                f"The loss of {name} is {loss} by step {n_steps_done:,}. "
                "Lower the learning rate (optimisation.lr), or look for non-finite activations in the store."
            )
        return {
            "sae": name,
            "step": n_steps_done,
            "tokens": n_steps_done * (n_rows // n),
            "loss": loss,
            **losses,
            "fvu": float(sums.squared_error) / variance,
            "l0": int(sums.n_active) / n_rows,
            "dead_fraction": self.trainers[name].dead_fraction,
            "dense_fraction": float((sums.n_fired > _DENSE_SHARE * n_rows).double().mean()),
            "grad_norm": float(sums.grad_norm) / n,
            "lr": self.trainers[name].settings.schedule.lr(n_steps_done - 1),
            **self.trainers[name].architecture.figures(),
        }


def _joined(normalisers: Mapping[str, Normaliser], hooks: tuple[str, ...]) -> Normaliser:
    parts = [normalisers[hook] for hook in hooks]
    return parts[0] if len(parts) == 1 else Normaliser.joined(parts)
