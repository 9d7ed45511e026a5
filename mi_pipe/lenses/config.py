"""What can be chosen about the training of a tuned lens."""

from typing import Annotated

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from mi_pipe.core.config import Config
from mi_pipe.core.errors import ConfigError

Fraction = Annotated[float, Field(gt=0, lt=1)]


class TunedLensConfig(Config):
    """How translators are trained on a store's rows, and on how many they are measured."""

    n_steps: PositiveInt = 250
    """Optimiser steps."""
    batch_rows: PositiveInt = 1024
    """Rows of a step: whole prompts until there are as many."""
    lr: PositiveFloat = 1e-3
    """Adam's learning rate at the first step; it falls to 0 linearly."""
    validation_fraction: Fraction = 0.05
    """Share of the prompts on which the best moment of the training is chosen, for each depth."""
    held_out_fraction: Fraction = 0.1
    """Share of the prompts that only the evaluation sees."""
    split_seed: NonNegativeInt = 0
    """Which prompts these are; with the same seed and share the held-out ones of every stage."""
    seed: NonNegativeInt = 0
    """Order of the training prompts."""
    validation_rows: PositiveInt = 1024
    """At most so many rows of validation prompts."""
    evaluation_rows: PositiveInt = 8192
    """At most so many rows of held-out prompts."""
    checkpoint_steps: PositiveInt = 25
    """Steps between validations, each of which a killed training goes on from."""

    def checkpoints(self) -> list[int]:
        """Return the numbers of steps after which is validated; 0 is the logit lens.

        >>> TunedLensConfig(n_steps=60).checkpoints()
        [0, 25, 50, 60]
        """
        return [*range(0, self.n_steps, self.checkpoint_steps), self.n_steps]

    def check(self) -> None:
        """Raise ConfigError if no prompts are left to train on."""
        if self.validation_fraction + self.held_out_fraction >= 1:
            raise ConfigError(
                f"lenses.tuned: validation_fraction {self.validation_fraction} and held_out_fraction "
                f"{self.held_out_fraction} leave no prompts to train on."
            )
