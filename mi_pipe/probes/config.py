"""What can be chosen about probes: labels, places, parts, and how linear and MLP probes are fitted."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from mi_pipe.core.canonical import file_sha256
from mi_pipe.core.config import Config, Execution
from mi_pipe.core.errors import ConfigError
from mi_pipe.probes.user_labels import source_hash

ProbeKind = Literal["linear", "mlp"]
Fraction = Annotated[float, Field(gt=0, lt=1)]
_SOURCES = ("column", "where", "function", "table")


class LabelConfig(Config):
    """What a probe is to read: just one of column, where, function and table."""

    column: str | None = None
    """A column of the store's token or prompt table, such as answer, source or n_tokens."""
    where: str | None = None
    """A condition on rows, such as "token == ' Mary'" or "pos == pos_s2": yes or no."""
    function: str | None = None
    """`module:callable`, given the rows' table (tokens and prompts) as a frame, returning one value a row."""
    table: Annotated[Path | None, Execution()] = None
    """A Parquet table with `label` and the keys `row`, or `prompt_idx` and `pos`, or `prompt_idx`."""
    kind: Literal["auto", "classification", "regression"] = "auto"
    """auto: texts, yes or no, and at most 20 whole numbers are classes; other numbers are regressed."""

    @model_validator(mode="after")
    def _one_source(self) -> "LabelConfig":
        given = [name for name in _SOURCES if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"a label has one of column, where, function and table, not {' and '.join(given) or 'none'}"
            )
        return self

    def identity(self) -> dict[str, Any]:
        """Return the table's SHA-256 instead of its path, and the hash of a function's source; raises ConfigError."""
        found = super().identity()
        if self.table is not None:
            if not self.table.is_file():
                raise ConfigError(f"The table of labels {self.table} does not exist.")
            found["table_sha256"] = file_sha256(self.table)
        if self.function is not None:
            found["function_sha256"] = source_hash(self.function)
        return found


class SplitConfig(Config):
    """Which prompts are for fitting, for choosing, and for the figures that are reported; pairs stay together."""

    validation_fraction: Fraction = 0.15
    """Share of the prompts on which L2 is chosen."""
    test_fraction: Fraction = 0.25
    """Share of the prompts that only the reported figures see."""
    seed: NonNegativeInt = 0
    """Which prompts these are."""
    max_rows: PositiveInt = 20_000
    """At most so many training rows, a random choice; of validation and test half as many each."""

    @model_validator(mode="after")
    def _leaves_training(self) -> "SplitConfig":
        if self.validation_fraction + self.test_fraction >= 1:
            raise ValueError("validation_fraction and test_fraction leave no prompts to train on")
        return self


class MLPConfig(Config):
    """Probes with one hidden layer of ReLUs, trained by Adam."""

    hidden: PositiveInt = 128
    """Hidden units."""
    l2: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)] = (1e-4, 1e-2)
    """Penalties that are tried, on the weights of both layers."""
    n_epochs: PositiveInt = 60
    """Passes over the training rows; the best one on validation rows is kept."""
    batch_rows: PositiveInt = 256
    """Rows of a step."""
    lr: PositiveFloat = 1e-3
    """Adam's learning rate."""


class CausalConfig(Config):
    """Whether the model uses what a linear probe reads: activations moved along its direction."""

    amounts: Annotated[tuple[float, ...], Field(min_length=1)] = (-3.0, -1.0, 1.0, 3.0)
    """How far, in standard deviations of the training rows along the direction."""
    max_prompts: PositiveInt = 32
    """Test prompts that are run, the first ones."""
    metric: Literal["logit_diff", "probability", "prob_diff", "loss", "kl"] = "logit_diff"
    """What is measured of the model's answer at the last position, where the prompts have answers."""
    seed: NonNegativeInt = 0
    """Of the random direction that each probe's is compared with."""


class ProbeOptions(Config):
    """How every probe is fitted."""

    kinds: Annotated[tuple[ProbeKind, ...], Field(min_length=1)] = ("linear",)
    """linear: logistic regression or ridge; mlp."""
    l2: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)] = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
    """Penalties that are tried for linear probes, on standardised activations; validation rows choose."""
    mlp: MLPConfig = MLPConfig()
    """MLP probes."""
    control: str = "token_id"
    """Column whose values get random labels in the control task (Hewitt and Liang 2019); "" for none."""
    min_class_rows: PositiveInt = 5
    """Classes with fewer training rows are left out."""
    max_classes: Annotated[int, Field(ge=2)] = 50
    """The most frequent classes are kept."""
    seed: NonNegativeInt = 0
    """Of control labels and MLP weights."""
