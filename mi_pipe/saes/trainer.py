"""One SAE in training: parameters, moments, dead counters, and one step on a batch of normalised activations.

loss = Σ‖x̃ - x̂‖² / (batch * d_in) + AuxK. Since E‖x̃‖² = d_in, the first part is the FVU to within a batch's chance,
whatever the model and layer.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mi_pipe.saes.architecture import Architecture
from mi_pipe.saes.auxk import auxk
from mi_pipe.saes.code import SparseCode
from mi_pipe.saes.gradients import Parameters, code_gradients
from mi_pipe.saes.kernels import Precision, decode, pre_activations, products_at
from mi_pipe.saes.optimisation import Optimiser, Schedule, unit_rows_


@dataclass(frozen=True)
class TrainerSettings:
    """What a trainer needs to know beside its architecture."""

    schedule: Schedule
    dead_window: int
    """Tokens without firing after which a feature is dead."""
    clip_norm: float = 1.0
    auxk_coefficient: float = 1 / 32
    encoder_precision: Precision = "float32"


@dataclass(frozen=True)
class Gradients:
    """The outcome of one forward and backward pass."""

    loss: Float[Tensor, ""]
    squared_error: Float[Tensor, ""]
    code: SparseCode
    parameters: Parameters


@dataclass(frozen=True)
class StepFigures:
    """What one training step measured."""

    loss: Float[Tensor, ""]
    squared_error: Float[Tensor, ""]
    n_active: Tensor
    grad_norm: float
    lr: float


class Scratch:
    """Reused memory for pre-activations, shared by trainers that step one after the other."""

    def __init__(self) -> None:
        """Hold nothing yet."""
        self._buffers: dict[tuple[int, int, torch.dtype, torch.device], Tensor] = {}

    def matrix(self, n_rows: int, n_columns: int, like: Tensor) -> Tensor:
        """Return an uninitialised matrix, the same one at each call with this shape."""
        key = (n_rows, n_columns, like.dtype, like.device)
        if key not in self._buffers:
            self._buffers[key] = like.new_empty(n_rows, n_columns)
        return self._buffers[key]


def initial_parameters(d_in: int, d_sae: int, seed: int) -> Parameters:
    """Return random unit decoder rows, the encoder tied to them, and zero biases."""
    generator = torch.Generator().manual_seed(seed)
    W_dec = torch.randn(d_sae, d_in, generator=generator)  # noqa: N806 (the field's name)
    unit_rows_(W_dec)
    return Parameters(W_dec.clone(), W_dec, torch.zeros(d_sae), torch.zeros(d_in))


def loss_gradients(
    params: Parameters,
    x: Float[Tensor, "batch d_in"],
    architecture: Architecture,
    dead: Tensor,
    settings: TrainerSettings,
    scratch: Scratch | None = None,
) -> Gradients:
    """Return loss and gradients on normalised activations; `dead` lists the dead features (int64)."""
    inputs = x - params.b_dec
    d_sae = params.W_enc.shape[0]
    out = scratch.matrix(x.shape[0], d_sae, x) if scratch and settings.encoder_precision == "float32" else None
    pre = pre_activations(inputs, params.W_enc, params.b_enc, settings.encoder_precision, out)
    code = architecture.select(pre)
    if settings.encoder_precision != "float32":
        code = _exact_values(code, inputs, params)
    difference = decode(code, params.W_dec).sub_(inputs)
    squared_error = torch.linalg.vector_norm(difference).square()
    loss = squared_error / x.numel()
    gradients = code_gradients(params, code, inputs, difference * (2 / x.numel()))
    if dead.shape[0] and settings.auxk_coefficient:
        aux = auxk(params, pre, dead, inputs, -difference, settings.auxk_coefficient)
        loss = loss + aux.loss
        for total, part in zip(gradients.named().values(), aux.gradients.named().values(), strict=True):
            total.add_(part)
    return Gradients(loss, squared_error, code, gradients)


def _exact_values(code: SparseCode, inputs: Tensor, params: Parameters) -> SparseCode:
    """Recompute the selected values in full precision, so that a narrow product only decides the selection."""
    values = products_at(code, inputs, params.W_enc) + params.b_enc[code.features]
    return code.with_values(values.relu_())


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
        self._optimiser = Optimiser(params, settings.schedule, settings.clip_norm)
        self._tokens_silent = torch.zeros(params.W_enc.shape[0], dtype=torch.int64, device=params.device)

    def step(self, x: Float[Tensor, "batch d_in"], step: int) -> StepFigures:
        """Take one step on normalised activations."""
        dead = self.dead().nonzero().squeeze(1)
        result = loss_gradients(self.params, x, self.architecture, dead, self.settings, self._scratch)
        grad_norm, lr = self._optimiser.step(result.parameters, step)
        self.architecture.observe(result.code)
        self._tokens_silent += x.shape[0]
        self._tokens_silent[result.code.fired()] = 0
        return StepFigures(result.loss, result.squared_error, result.code.n_active(), grad_norm, lr)

    def dead(self) -> Tensor:
        """Say of each feature whether it has been silent for the whole window."""
        return self._tokens_silent >= self.settings.dead_window

    @property
    def dead_fraction(self) -> float:
        """Share of features that are dead."""
        return float(self.dead().double().mean())

    def state(self) -> dict[str, Tensor]:
        """Return everything a checkpoint must hold to go on exactly."""
        return {
            **{f"params.{name}": value for name, value in self.params.named().items()},
            **{f"adam.{name}": value for name, value in self._optimiser.state().items()},
            **{f"architecture.{name}": value for name, value in self.architecture.state().items()},
            "tokens_silent": self._tokens_silent,
        }

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Go on from a checkpoint's state."""
        for name, value in self.params.named().items():
            value.copy_(state[f"params.{name}"])
        self._optimiser.load_state(_below(state, "adam."))
        self.architecture.load_state(_below(state, "architecture."))
        self._tokens_silent.copy_(state["tokens_silent"])


def _below(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
