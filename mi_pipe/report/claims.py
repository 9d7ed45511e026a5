"""Claims: statements about measured results, each with the number it needs, and whether the number bears it out.

A claim names a stage (and a label where a recipe ran the stage more than once) and a metric, which is one of
    <name>                       a main figure of the artifact's manifest, such as `loss`
    elapsed_s, size_bytes        of the manifest itself
    <table>.<column>.<how>       a column of one of the artifact's Parquet tables (`scores.induction.max`),
                                 reduced by min, max, mean, median, sum, first or last
A claim whose metric cannot be found, or is not a finite number where one is compared, does not hold, and says why.
"""

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import Field, model_validator

from mi_pipe.core.artifact import Artifact
from mi_pipe.core.config import Config
from mi_pipe.core.errors import near_names
from mi_pipe.core.manifest import Scalar
from mi_pipe.report.naming import short_name

Comparison = Literal[">", ">=", "<", "<=", "==", "between"]
_ORDERED: dict[str, Callable[[float, float], bool]] = {
    ">": operator.gt,
    ">=": operator.ge,
    "<": operator.lt,
    "<=": operator.le,
}
_MANIFEST_FIELDS = ("elapsed_s", "size_bytes", "n_launches")
_REDUCTIONS = ("min", "max", "mean", "median", "sum", "first", "last")
_PATH_PARTS = 3


class Claim(Config):
    """A statement about a result that the report checks."""

    statement: str = Field(min_length=1)
    """What is claimed, in words."""
    stage: str = Field(min_length=1)
    """The stage whose artifact is measured, such as `heads`."""
    label: str = ""
    """The artifact's label (a task's name) where the stage ran more than once."""
    metric: str = Field(min_length=1)
    """A main figure's name, or `<table>.<column>.<min|max|mean|median|sum|first|last>`."""
    comparison: Comparison
    """How the measured value is compared with `value`; `between` includes both ends."""
    value: bool | float | str | tuple[float, float]
    """The value compared with; two numbers for `between`."""
    source: str = ""
    """Where the claim comes from: a paper, a table, the recipe's author."""

    @model_validator(mode="after")
    def _value_fits_comparison(self) -> "Claim":
        is_pair = isinstance(self.value, tuple)
        if is_pair != (self.comparison == "between"):
            raise ValueError(f"comparison {self.comparison!r} does not fit the value {self.value!r}")
        if isinstance(self.value, tuple) and self.value[0] > self.value[1]:
            raise ValueError(f"the lower end comes first in {self.value!r}")
        if self.comparison in _ORDERED and isinstance(self.value, str | bool):
            raise ValueError(f"comparison {self.comparison!r} needs a number, not {self.value!r}")
        return self


@dataclass(frozen=True)
class Verdict:
    """A claim, what was measured, whether it holds, and why not where it could not be measured."""

    claim: Claim
    measured: Scalar
    holds: bool
    artifact_id: str = ""
    reason: str = ""


def holds(claim: Claim, measured: Scalar) -> bool:
    """Say whether `measured` bears out the claim; text and NaN never satisfy a comparison of numbers."""
    if claim.comparison == "==":
        return measured is not None and measured == claim.value
    if isinstance(measured, str | bool) or measured is None or math.isnan(measured):
        return False
    if isinstance(claim.value, tuple):
        return claim.value[0] <= measured <= claim.value[1]
    return _ORDERED[claim.comparison](measured, float(claim.value))


def judge(claim: Claim, artifacts: Sequence[Artifact]) -> Verdict:
    """Measure the claim on the one artifact it names and compare."""
    found = [artifact for artifact in artifacts if _is_named(claim, artifact)]
    if len(found) != 1:
        return Verdict(claim, None, False, reason=_which_reason(claim, found))
    try:
        measured = measure(claim.metric, found[0])
    except LookupError as error:
        return Verdict(claim, None, False, found[0].id, str(error.args[0]))
    return Verdict(claim, measured, holds(claim, measured), found[0].id)


def measure(metric: str, artifact: Artifact) -> Scalar:
    """Return the value of `metric` in `artifact`; raises LookupError saying what there is instead."""
    if metric in artifact.summary:
        return artifact.summary[metric]
    if metric in _MANIFEST_FIELDS:
        return getattr(artifact.manifest, metric)
    parts = metric.split(".")
    if len(parts) == _PATH_PARTS and f"{parts[0]}.parquet" in artifact.manifest.files:
        return _reduced(artifact, *parts)
    near = near_names(metric, [*artifact.summary, *_MANIFEST_FIELDS])
    raise LookupError(f"{artifact.id} has no figure {metric!r}.{near}")


def _reduced(artifact: Artifact, table: str, column: str, reduction: str) -> Scalar:
    frame = artifact.read_table(f"{table}.parquet")
    if column not in frame:
        raise LookupError(f"{table}.parquet has no column {column!r}.{near_names(column, map(str, frame.columns))}")
    if reduction not in _REDUCTIONS:
        raise LookupError(f"{reduction!r} is not one of {', '.join(_REDUCTIONS)}.")
    values = frame[column].dropna()
    if values.empty:
        raise LookupError(f"{table}.parquet has no value in {column!r}.")
    if reduction in ("first", "last"):
        value = values.iloc[0 if reduction == "first" else -1]
    else:
        value = getattr(values, reduction)()
    return value.item() if hasattr(value, "item") else value


def _is_named(claim: Claim, artifact: Artifact) -> bool:
    return artifact.manifest.stage == claim.stage and claim.label in ("", artifact.manifest.label, short_name(artifact))


def _which_reason(claim: Claim, found: Sequence[Artifact]) -> str:
    where = f"{claim.stage} {claim.label!r}" if claim.label else claim.stage
    if not found:
        return f"This report has no artifact of {where}."
    labels = ", ".join(repr(artifact.manifest.label) for artifact in found)
    return f"This report has {len(found)} artifacts of {where}; name one by its label: {labels}."
