"""The options of SAE training."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from mi_pipe.core.config import Config, Execution
from mi_pipe.saes.architecture import ArchitectureName
from mi_pipe.saes.auxk import dead_window
from mi_pipe.saes.kernels import Precision
from mi_pipe.saes.optimisation import Schedule, default_lr
from mi_pipe.saes.trainer import TrainerSettings

Fraction = Annotated[float, Field(ge=0, le=1)]


class OptimisationConfig(Config):
    """How fast the weights move."""

    lr: PositiveFloat | None = None
    """Adam's learning rate at its peak; None means 2e-4 / √(d_sae / 16384)."""
    warmup_steps: NonNegativeInt = 1000
    """Steps of linear rise at the start, unless `warmup_fraction` of all steps is less."""
    warmup_fraction: Fraction = 0.05
    """Largest share of the steps that may be warm-up."""
    decay_fraction: Fraction = 0.2
    """Share of the steps, at the end, over which the rate falls linearly to zero."""
    clip_norm: PositiveFloat = 1.0
    """Largest norm of the gradient of all parameters of an SAE."""


class DeadFeatureConfig(Config):
    """Features that no longer fire."""

    window_tokens: PositiveInt = 10_000_000
    """Tokens without firing after which a feature is dead; a tenth of `n_tokens` if that is less."""
    auxk_coefficient: NonNegativeFloat = 1 / 32
    """Weight of the loss by which dead features learn what the others leave over (AuxK); 0 for none."""


class DataConfig(Config):
    """Which rows are trained on, in which order."""

    held_out_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """Share of the prompts kept for evaluation."""
    split_seed: NonNegativeInt = 0
    """Decides which prompts are held out."""
    shuffle_seed: NonNegativeInt = 0
    """Decides the order of rows."""
    pool_rows: PositiveInt = 262_144
    """Rows mixed at a time: more gives better shuffling and takes 2 * pool_rows * d_in * 2 to 4 bytes of memory."""


class EvaluationConfig(Config):
    """What is measured on held-out prompts."""

    n_rows: PositiveInt = 32_768
    """Most held-out rows for FVU, L0 and cosine."""
    n_prompts: NonNegativeInt = 64
    """Most held-out prompts for cross-entropy in the model; 0 for none."""


class TrainSAEsConfig(Config):
    """A sweep: every combination of hook point, architecture, k, d_sae and seed is one SAE."""

    hooks: list[str] | None = None
    """Hook points of the store to train on; None means all."""
    architecture: ArchitectureName | list[ArchitectureName] = "topk"
    """topk (k features a row) or batchtopk (k a row on average), or a list."""
    d_sae: PositiveInt | list[PositiveInt] = 4608
    """Number of features, or a list."""
    k: PositiveInt | list[PositiveInt] = 32
    """Active features a row, or a list."""
    seeds: list[NonNegativeInt] = Field(default=[0], min_length=1)
    """Seeds of the initial weights; one SAE for each."""
    n_tokens: PositiveInt = 2_000_000
    """Tokens (rows) to train on; more than the store holds means several epochs."""
    batch_rows: PositiveInt = 4096
    """Rows of a training step."""
    encoder_precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the encoder's product; auto is bfloat16 where the device is made for it (CUDA, AMX). Weights and
    the kept values stay float32."""
    optimisation: OptimisationConfig = OptimisationConfig()
    """Learning rate and its schedule."""
    dead_features: DeadFeatureConfig = DeadFeatureConfig()
    """When a feature is dead and what is done about it."""
    data: DataConfig = DataConfig()
    """Order of rows and the held-out share."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """Held-out measurements."""
    log_steps: PositiveInt = 25
    """Steps that one row of the training curve sums up."""
    checkpoint_s: Annotated[NonNegativeFloat, Execution()] = 120.0
    """Seconds between checkpoints; a killed training loses at most this much."""
    device: Annotated[str, Execution()] = "auto"
    """auto, cpu, cuda, cuda:1 or mps."""

    @property
    def n_steps(self) -> int:
        """Number of training steps: whole batches within the budget, at least one."""
        return max(1, self.n_tokens // self.batch_rows)

    def trainer_settings(self, d_sae: int, precision: Precision) -> TrainerSettings:
        """Return the settings of a trainer of this width."""
        rates = self.optimisation
        schedule = Schedule.of_budget(
            peak=rates.lr or default_lr(d_sae),
            n_steps=self.n_steps,
            warmup_steps=rates.warmup_steps,
            warmup_fraction=rates.warmup_fraction,
            decay_fraction=rates.decay_fraction,
        )
        return TrainerSettings(
            schedule=schedule,
            dead_window=dead_window(self.n_tokens, self.dead_features.window_tokens),
            clip_norm=rates.clip_norm,
            auxk_coefficient=self.dead_features.auxk_coefficient,
            encoder_precision=precision,
        )
