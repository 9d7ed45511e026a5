"""One SAE in training: parameters, moments, dead counters, and one step on a batch of normalised activations."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mi_pipe.saes.architectures.base import Architecture
from mi_pipe.saes.averaging import WeightAverage
from mi_pipe.saes.inference import InferenceRule
from mi_pipe.saes.kernels import Precision
from mi_pipe.saes.optimisation import Optimiser, Schedule
from mi_pipe.saes.parameters import Parameters
from mi_pipe.saes.resampling import resample
from mi_pipe.saes.step import Batch, Outcome, Scratch, StepContext

_LAST_RESAMPLING = 0.5
"""Share of the training after which features that die are left dead, for want of time to learn."""


@dataclass(frozen=True)
class TrainerSettings:
    """What a trainer needs to know beside its architecture."""

    schedule: Schedule
    dead_window: int
    """Tokens without firing after which a feature is dead."""
    clip_norm: float = 1.0
    auxk_coefficient: float = 1 / 32
    encoder_precision: Precision = "float32"
    average_decay: float | None = None
    """Decay of the weights' running average, which is then what is saved; None for none."""
    resample_steps: int | None = None
    """Steps between resamplings of dead features; None for none."""
    threshold_lr: float = 1.0
    """What JumpReLU's thresholds multiply the learning rate by."""
    seed: int = 0


@dataclass(frozen=True)
class StepFigures:
    """What one training step measured."""

    losses: dict[str, Float[Tensor, ""]]
    squared_error: Float[Tensor, ""]
    n_active: Tensor
    n_fired: Tensor
    grad_norm: float
    lr: float


class SAETrainer:
    """Trains one SAE, a batch at a time."""

    def __init__(
        self, params: Parameters, architecture: Architecture, settings: TrainerSettings, scratch: Scratch | None = None
    ) -> None:
        """Train `params` in place."""
        self.params = params
        self.architecture = architecture
        self.settings = settings
        self._scratch = scratch
        self._optimiser = Optimiser(
            params,
            settings.schedule,
            settings.clip_norm,
            architecture.has_unit_decoder,
            {"threshold": settings.threshold_lr},
        )
        self._tokens_silent = torch.zeros(params.d_sae, dtype=torch.int64, device=params.device)
        decay = settings.average_decay
        self._average = None if decay is None else WeightAverage(params, decay)

    def step(self, batch: Batch, step: int) -> StepFigures:
        """Take one step on normalised activations."""
        if step == 0:
            self.architecture.prepare(self.params, batch)
        n_rows = batch.x.shape[0]
        outcome = self.architecture.outcome(self.params, batch, self._context(step))
        grad_norm, lr = self._optimiser.step(outcome.gradients, step)
        self.architecture.constrain(self.params)
        self.architecture.observe(outcome, n_rows)
        self._tokens_silent += n_rows
        self._tokens_silent[outcome.n_fired > 0] = 0
        self._resample(batch, outcome, step)
        if self._average is not None:
            self._average.update(self.params, step)
        return StepFigures(outcome.losses, outcome.squared_error, outcome.n_active, outcome.n_fired, grad_norm, lr)

    def dead(self) -> Tensor:
        """Say of each feature whether it has been silent for the whole window."""
        return self._tokens_silent >= self.settings.dead_window

    @property
    def dead_fraction(self) -> float:
        """Share of features that are dead."""
        return float(self.dead().double().mean())

    def result(self) -> tuple[Parameters, InferenceRule]:
        """Return the parameters to save, averaged where that was asked for, and how to select with them."""
        params = self.params
        if self._average is not None:
            params = self._average.parameters(self.architecture.has_unit_decoder)
        return params, self.architecture.rule(params)

    def state(self) -> dict[str, Tensor]:
        """Return everything a checkpoint must hold to go on exactly."""
        average = {} if self._average is None else self._average.state()
        return {
            **{f"params.{name}": value for name, value in self.params.named().items()},
            **{f"adam.{name}": value for name, value in self._optimiser.state().items()},
            **{f"architecture.{name}": value for name, value in self.architecture.state().items()},
            **{f"average.{name}": value for name, value in average.items()},
            "tokens_silent": self._tokens_silent,
        }

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Go on from a checkpoint's state."""
        for name, value in self.params.named().items():
            value.copy_(state[f"params.{name}"])
        self._optimiser.load_state(below(state, "adam."))
        self.architecture.load_state(below(state, "architecture."))
        if self._average is not None:
            # A training that goes on from one without an average begins it at the weights as they are.
            self._average.load_state(below(state, "average.") or self.params.named())
        self._tokens_silent.copy_(state["tokens_silent"])

    def _context(self, step: int) -> StepContext:
        settings = self.settings
        return StepContext(
            step,
            settings.schedule.n_steps,
            self.dead().nonzero().squeeze(1),
            settings.auxk_coefficient,
            settings.encoder_precision,
            self._scratch,
        )

    def _resample(self, batch: Batch, outcome: Outcome, step: int) -> None:
        every = self.settings.resample_steps
        if every is None or (step + 1) % every or step + 1 > _LAST_RESAMPLING * self.settings.schedule.n_steps:
            return
        dead = self.dead().nonzero().squeeze(1)
        generator = torch.Generator().manual_seed((self.settings.seed << 32) + step)
        resample(self.params, batch, dead, outcome.difference.square().sum(1), generator)
        self._optimiser.forget(dead)
        self._tokens_silent[dead] = 0


def below(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the part of a state whose names begin with a prefix, without it."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
