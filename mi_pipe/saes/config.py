"""The options of SAE training."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from mi_pipe.core.config import Config, Execution
from mi_pipe.saes.architectures.base import ArchitectureName
from mi_pipe.saes.architectures.jumprelu import BANDWIDTH, THRESHOLD_LR, SparsityLoss
from mi_pipe.saes.architectures.matryoshka import DEFAULT_FRACTIONS
from mi_pipe.saes.architectures.p_anneal import P_END

Fraction = Annotated[float, Field(ge=0, le=1)]
ShareOfFeatures = Annotated[float, Field(gt=0, le=1)]


class OptimisationConfig(Config):
    """How fast the weights move."""

    lr: PositiveFloat | list[PositiveFloat] | None = None
    """Adam's learning rate at its peak, or a list; None means 2e-4 / √(d_sae / 16384), times √(8192 / steps) in
    trainings of fewer steps; at most 5e-3."""
    warmup_steps: NonNegativeInt = 1000
    """Steps of linear rise at the start, unless `warmup_fraction` of all steps is less."""
    warmup_fraction: Fraction = 0.05
    """Largest share of the steps that may be warm-up."""
    decay_fraction: Fraction = 0.2
    """Share of the steps, at the end, over which the rate falls linearly to zero."""
    clip_norm: PositiveFloat = 1.0
    """Largest norm of the gradient of all parameters of an SAE."""
    average_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay of a running average of the weights, which is then what is saved; none for the weights themselves."""


class SparsityConfig(Config):
    """How architectures with a penalty become sparse, and how k comes to its value."""

    coefficient: PositiveFloat | list[PositiveFloat] | None = None
    """A fixed weight of the penalty, or a list, for standard, jumprelu, gated and p_anneal; by default the weight is
    led so that L0 comes to `k`."""
    warmup_fraction: Fraction = 0.05
    """Share of the steps over which the penalty rises to its full weight."""
    k_start: PositiveInt | None = None
    """k of the first step (topk, batchtopk, matryoshka), falling linearly to `k`; none for no annealing."""
    k_fraction: Fraction = 0.5
    """Share of the steps over which k falls."""


class JumpReLUConfig(Config):
    """JumpReLU's thresholds."""

    loss: SparsityLoss = "target"
    """target, λ (L0 / k - 1)²; step, λ L0; or tanh, λ Σ tanh(4 z)."""
    bandwidth: PositiveFloat = BANDWIDTH
    """Width ε of the window in which a threshold feels its features; activations have variance 1 a dimension."""
    threshold_lr: PositiveFloat = THRESHOLD_LR
    """What the thresholds multiply the learning rate by."""


class DeadFeatureConfig(Config):
    """Features that no longer fire."""

    window_tokens: PositiveInt = 10_000_000
    """Tokens without firing after which a feature is dead; a tenth of `n_tokens` if that is less."""
    auxk_coefficient: NonNegativeFloat = 1 / 32
    """Weight of the loss by which dead features learn what the others leave over (AuxK); 0 for none."""
    resample_steps: PositiveInt | None = None
    """Steps between resamplings, by which dead features begin again at badly reconstructed inputs (over the first half
    of the training); none for no resampling."""


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
    """Most held-out rows for FVU, L0 and cosine at the end."""
    n_prompts: NonNegativeInt = 64
    """Most held-out prompts for cross-entropy and KL in the model at the end; 0 for none."""
    n_intervals: NonNegativeInt = 8
    """How often held-out rows are looked at during the training; 0 for never."""
    interval_rows: PositiveInt = 4096
    """Most held-out rows at each of them."""
    interval_prompts: NonNegativeInt = 0
    """Most held-out prompts in the model at each of them."""


class TrainSAEsConfig(Config):
    """A sweep: every combination of hook point, architecture, k, d_sae, seed and learning rate is one SAE."""

    hooks: list[str] | None = None
    """Hook points of the store to train on; none means all. `input -> output` is a transcoder, `first + second` a
    crosscoder over hook points, `other:hook` a hook point of `other_store`."""
    other_store: Annotated[str | None, Execution()] = None
    """A second store of activations of the same tokens (another model's): an id of the store, or a URL."""
    architecture: ArchitectureName | list[ArchitectureName] = "topk"
    """standard, topk, batchtopk, jumprelu, gated, matryoshka or p_anneal, or a list."""
    d_sae: PositiveInt | list[PositiveInt] = 4608
    """Number of features, or a list."""
    k: PositiveInt | list[PositiveInt] = 32
    """Active features a row, or a list: exactly for topk, on average for batchtopk and matryoshka, aimed at by the
    others."""
    seeds: list[NonNegativeInt] = Field(default=[0], min_length=1)
    """Seeds of the initial weights; one SAE for each."""
    n_tokens: PositiveInt = 2_000_000
    """Tokens (rows) to train on; more than the store holds means several epochs."""
    batch_rows: PositiveInt = 4096
    """Rows of a training step."""
    skip: bool = False
    """Give transcoders a linear path around the features."""
    encoder_precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the encoder's product; auto is bfloat16 where the device is made for it (CUDA, AMX). Weights and
    the kept values stay float32."""
    optimisation: OptimisationConfig = OptimisationConfig()
    """Learning rate and its schedule."""
    sparsity: SparsityConfig = SparsityConfig()
    """How sparse, and how that comes about."""
    jumprelu: JumpReLUConfig = JumpReLUConfig()
    """JumpReLU's thresholds."""
    matryoshka_fractions: list[ShareOfFeatures] = Field(default=list(DEFAULT_FRACTIONS), min_length=1)
    """Prefixes of a matryoshka SAE as shares of its features; the whole is always one."""
    p_end: Annotated[float, Field(gt=0, lt=1)] = P_END
    """The power that p_anneal ends with."""
    dead_features: DeadFeatureConfig = DeadFeatureConfig()
    """When a feature is dead and what is done about it."""
    data: DataConfig = DataConfig()
    """Order of rows and the held-out share."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """Held-out measurements."""
    start_from: Annotated[str | None, Execution()] = None
    """Id of a finished training with the same options but fewer tokens, to go on from."""
    keep_state: bool = True
    """Keep moments and counters beside the weights (twice their size), so that a later training can go on."""
    log_steps: PositiveInt = 25
    """Steps that one row of the training curve sums up."""
    checkpoint_s: Annotated[NonNegativeFloat, Execution()] = 120.0
    """Seconds between checkpoints; a killed training loses at most this much."""
    device: Annotated[str, Execution()] = "auto"
    """auto, cpu, cuda, cuda:1 or mps; several, as in cuda:0,cuda:1, share the SAEs among them."""

    @property
    def devices(self) -> list[str]:
        """Names of the devices to train on."""
        return [name.strip() for name in self.device.split(",")]

    @property
    def n_steps(self) -> int:
        """Number of training steps: whole batches within the budget, at least one."""
        return max(1, self.n_tokens // self.batch_rows)
