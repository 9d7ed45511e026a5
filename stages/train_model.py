"""A toy attention-only transformer, trained on repeated random tokens until it has induction heads.

Every sequence draws its own period, so that no head can look back by a fixed distance: the model has to find the
earlier copy by content, which takes a previous-token head and an induction head (Olsson et al. 2022). Lengths
differ from step to step, so that it also works at lengths between.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Self

import numpy as np
import pandas as pd
import torch
from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from mi_pipe.core.config import Config, Execution
from mi_pipe.core.manifest import Scalar
from mi_pipe.core.stage import Estimate, Stage
from mi_pipe.core.workspace import Workspace
from mi_pipe.models.device import pick_device
from mi_pipe.models.trained import CONFIG_FILE, WEIGHTS_FILE, native_module
from mi_pipe.models.training import Batch, Losses, OptimizerConfig, Trainer, accuracy, losses
from mi_pipe.prompts.repeated import random_periods, repeated_tokens

TRAINING_FILE = "training.parquet"
_CHECKPOINT = "checkpoint.safetensors"
_TRAINING, _HELD_OUT = 0, 1
_HELD_OUT_ROWS = 256


@dataclass(frozen=True)
class Inputs:
    """A model trained here needs no input."""


class ToyConfig(Config):
    """Sizes of an attention-only transformer with rotary positions and LayerNorm."""

    n_layers: PositiveInt = 2
    """Transformer blocks, each of attention alone."""
    n_heads: PositiveInt = 8
    """Attention heads a block."""
    d_model: PositiveInt = 64
    """Width of the residual stream."""
    d_vocab: PositiveInt = 64
    """Number of tokens."""
    n_ctx: PositiveInt = 128
    """Most tokens the model reads."""
    rotary_base: PositiveFloat = 10_000.0
    """Base of the rotary frequencies."""

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.d_model % (2 * self.n_heads):
            raise ValueError(
                f"d_model {self.d_model} must be an even multiple of n_heads {self.n_heads} (rotary pairs)"
            )
        return self

    def native_fields(self, seed: int) -> dict[str, Any]:
        """Return the fields of TransformerLens' bridge config."""
        return {
            **self.model_dump(),
            "d_head": self.d_model // self.n_heads,
            "attn_only": True,
            "normalization_type": "LN",
            "positional_embedding_type": "rotary",
            "seed": seed,
        }


class RepeatedDataConfig(Config):
    """Sequences of distinct random tokens, repeated."""

    min_length: int = Field(default=48, ge=4)
    """Fewest tokens of a sequence; each step draws one length for its batch."""
    max_length: int = Field(default=100, ge=4)
    """Most tokens of a sequence."""
    min_period: int = Field(default=6, ge=2)
    """Fewest tokens of a block before it repeats; each sequence draws its own."""
    max_period: int = Field(default=44, ge=2)
    """Most tokens of a block before it repeats."""

    @model_validator(mode="after")
    def _ranges(self) -> Self:
        if not self.min_period <= self.max_period <= self.min_length - 2 <= self.max_length - 2:
            raise ValueError(
                f"min_period {self.min_period} <= max_period {self.max_period} <= min_length {self.min_length} - 2 "
                f"<= max_length {self.max_length} - 2 must hold, so that every sequence repeats"
            )
        return self

    def batch(self, rng: np.random.Generator, d_vocab: int, n_rows: int, device: torch.device) -> Batch:
        """Return a batch; a token is predictable from the second token of the second copy on."""
        length = int(rng.integers(self.min_length, self.max_length + 1))
        periods = random_periods(rng, self.min_period, self.max_period, n_rows)
        tokens = repeated_tokens(rng, np.arange(d_vocab), length, periods)
        predictable = np.arange(1, length) > periods[:, None]
        return Batch(torch.from_numpy(tokens).long().to(device), torch.from_numpy(predictable).to(device))


class TrainModelConfig(Config):
    """The toy model and its training."""

    model: ToyConfig = ToyConfig()
    """Its sizes."""
    data: RepeatedDataConfig = RepeatedDataConfig()
    """What it is trained on."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """How it is trained."""
    n_steps: PositiveInt = 700
    """Steps of training."""
    seed: int = Field(default=0, ge=0)
    """Seed of the weights and of every batch."""
    checkpoint_every: Annotated[PositiveInt, Execution()] = 100
    """Steps between checkpoints, from which a killed run continues."""
    device: Annotated[str, Execution()] = "cpu"
    """Where to train; so small a model is fastest on the CPU."""

    @model_validator(mode="after")
    def _data_fits_model(self) -> Self:
        if self.data.max_length > self.model.n_ctx:
            raise ValueError(f"data.max_length {self.data.max_length} is more than model.n_ctx {self.model.n_ctx}")
        if self.data.max_period > self.model.d_vocab:
            raise ValueError(f"data.max_period {self.data.max_period} is more than model.d_vocab {self.model.d_vocab}")
        return self


def estimate(config: TrainModelConfig, inputs: Inputs) -> Estimate:
    """Return the bytes of weights, a checkpoint with both moments, and the curve."""
    del inputs
    model = config.model
    n_parameters = 4 * model.n_layers * model.d_model**2 + 2 * model.d_vocab * model.d_model
    return Estimate(size_bytes=20 * n_parameters + 12 * config.n_steps, n_units=config.n_steps, unit="step")


def run(config: TrainModelConfig, inputs: Inputs, work: Workspace) -> dict[str, Scalar]:
    """Train, or continue training, and write weights, config and curve."""
    del inputs
    device = pick_device(config.device)
    fields = config.model.native_fields(config.seed)
    trainer = Trainer(native_module(fields).to(device), config.optimizer, config.n_steps)
    _train(trainer, config, device, work)
    work.write_tensors(WEIGHTS_FILE, dict(trainer.module.state_dict()))
    work.write_json(CONFIG_FILE, fields)
    work.write_table(TRAINING_FILE, _curve_frame(trainer))
    return _summary(trainer, config, device)


def _train(trainer: Trainer, config: TrainModelConfig, device: torch.device, work: Workspace) -> None:
    work.ledger.expect(math.ceil(config.n_steps / config.checkpoint_every))
    checkpoint = work.scratch / _CHECKPOINT
    if checkpoint.exists():
        trainer.restore(checkpoint)
    batch_at = partial(_batch_at, config, device)
    while trainer.step < config.n_steps:
        boundary = (trainer.step // config.checkpoint_every + 1) * config.checkpoint_every
        trainer.advance(batch_at, min(boundary, config.n_steps), work.progress)
        trainer.save(checkpoint)
        work.ledger.mark(f"step {trainer.step}")


def _batch_at(config: TrainModelConfig, device: torch.device, step: int) -> Batch:
    rng = np.random.default_rng([config.seed, _TRAINING, step])
    return config.data.batch(rng, config.model.d_vocab, config.optimizer.batch_rows, device)


def _curve_frame(trainer: Trainer) -> pd.DataFrame:
    loss, induction_loss = np.array(trainer.curve, np.float32).T
    return pd.DataFrame(
        {"step": np.arange(1, len(loss) + 1, dtype=np.int32), "loss": loss, "induction_loss": induction_loss}
    )


def _summary(trainer: Trainer, config: TrainModelConfig, device: torch.device) -> dict[str, Scalar]:
    rng = np.random.default_rng([config.seed, _HELD_OUT])
    held_out = config.data.batch(rng, config.model.d_vocab, _HELD_OUT_ROWS, device)
    with torch.no_grad():
        found: Losses = losses(trainer.module, held_out)
    return {
        "steps": trainer.step,
        "final_loss": trainer.curve[-1][0],
        "held_out_loss": found.all.item(),
        "induction_loss": found.predictable.item(),
        "induction_accuracy": accuracy(trainer.module, held_out),
    }


STAGE = Stage(name="train_model", version=1, config=TrainModelConfig, inputs=Inputs, run=run, estimate=estimate)
