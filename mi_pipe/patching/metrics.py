"""What a patched run is judged by: a metric of the answer position's logits, and how much of it a patch brings back.

Metrics (p = softmax of the logits; answers and wrongs are sets of tokens, usually of one each):
logit_diff = mean logit of the answers - mean logit of the wrongs;
probability = p(answers), prob_diff = p(answers) - p(wrongs), each the sum over its set (Hanna et al. 2023);
loss = -log p(answers); kl = KL(clean run || this run) (the default of ACDC, Conmy et al. 2023);
`module:callable` = any function (logits, pairs) -> one value a row.
Only logit_diff reads nothing but the answers' and wrongs' logits; all others need the whole vocabulary.

Fractions (activation patching as in Wang et al. 2022 and TransformerLens):
denoising, recovered fraction = (m_patched - m_corrupted) / (m_clean - m_corrupted): 1 is clean, 0 corrupted;
noising, lost fraction = (m_patched - m_clean) / (m_corrupted - m_clean): 1 is corrupted, 0 clean.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from traceback import extract_tb
from typing import Literal, Protocol, TypeVar

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor

from mi_pipe.core.canonical import content_hash
from mi_pipe.core.errors import ConfigError, StageError, near_names

Direction = Literal["denoising", "noising"]
Values = TypeVar("Values", float, np.ndarray, xr.DataArray)

NO_TOKEN = -1
"""Fills up the rows of token sets that have fewer tokens than others."""
_EQUAL = 1e-6
"""Metrics that differ by less, as a share of both, are equal: float32 has 24 bits."""


@dataclass(frozen=True)
class PairInfo:
    """What a metric may know of each row beside its logits."""

    answers: Int[Tensor, "row n_answers"]
    """Tokens that follow the clean prompt; NO_TOKEN fills up."""
    wrongs: Int[Tensor, "row n_wrongs"]
    """Tokens set against them; NO_TOKEN fills up."""
    clean_logits: Float[Tensor, "row d_vocab"] | None = None
    """The clean run's logits at the answer position; None where the metric does not need all logits."""

    @property
    def choices(self) -> Int[Tensor, "row choice"]:
        """The answers and then the wrongs, NO_TOKEN replaced by token 0: what a metric of few logits is given."""
        return torch.cat([self.answers, self.wrongs], dim=1).clamp_min(0)

    def rows(self, rows: Int[Tensor, " some"]) -> "PairInfo":
        """Return the info of some rows, in this order, repeated where asked."""
        clean = None if self.clean_logits is None else self.clean_logits[rows]
        return PairInfo(self.answers[rows], self.wrongs[rows], clean)


class Metric(Protocol):
    """One number for each row of logits, differentiable in them."""

    @property
    def name(self) -> str:
        """What is recorded of it."""
        ...

    @property
    def needs_all_logits(self) -> bool:
        """Whether it is given all logits; else only those of `pairs.choices`, in this order."""
        ...

    def values(self, logits: Float[Tensor, "row n"], pairs: PairInfo) -> Float[Tensor, " row"]:
        """Return the metric of each row; n is d_vocab, or the number of choices."""
        ...


@dataclass(frozen=True)
class LogitDiff:
    """Mean logit of the answers less mean logit of the wrongs."""

    name: str = "logit_diff"
    needs_all_logits: bool = False

    def values(self, logits: Float[Tensor, "row choice"], pairs: PairInfo) -> Float[Tensor, " row"]:
        """Return the difference from the logits of `pairs.choices`."""
        n_answers = pairs.answers.shape[1]
        return _mean(logits[:, :n_answers], pairs.answers) - _mean(logits[:, n_answers:], pairs.wrongs)


@dataclass(frozen=True)
class VocabularyMetric:
    """A metric of all logits: a function of them and of the rows' info."""

    name: str
    function: Callable[[Tensor, PairInfo], Tensor]
    needs_all_logits: bool = True

    def values(self, logits: Float[Tensor, "row d_vocab"], pairs: PairInfo) -> Float[Tensor, " row"]:
        """Return the function's values."""
        return self.function(logits, pairs)


def probability(logits: Float[Tensor, "row d_vocab"], pairs: PairInfo) -> Float[Tensor, " row"]:
    """Return the summed probability of the answers."""
    return _set_probability(logits, pairs.answers)


def prob_diff(logits: Float[Tensor, "row d_vocab"], pairs: PairInfo) -> Float[Tensor, " row"]:
    """Return the summed probability of the answers less that of the wrongs."""
    return _set_probability(logits, pairs.answers) - _set_probability(logits, pairs.wrongs)


def loss(logits: Float[Tensor, "row d_vocab"], pairs: PairInfo) -> Float[Tensor, " row"]:
    """Return -log of the summed probability of the answers, in nats."""
    chosen = logits.log_softmax(-1).gather(-1, pairs.answers.clamp_min(0))
    return -chosen.masked_fill(pairs.answers == NO_TOKEN, -torch.inf).logsumexp(-1)


def kl(logits: Float[Tensor, "row d_vocab"], pairs: PairInfo) -> Float[Tensor, " row"]:
    """Return KL(clean run || this run) at the answer position, in nats."""
    assert pairs.clean_logits is not None, "runs keep the clean logits where the metric needs all"
    clean, here = pairs.clean_logits.log_softmax(-1), logits.log_softmax(-1)
    return (clean.exp() * (clean - here)).sum(-1)


_VOCABULARY_METRICS: dict[str, Callable[[Tensor, PairInfo], Tensor]] = {
    "probability": probability,
    "prob_diff": prob_diff,
    "loss": loss,
    "kl": kl,
}
METRIC_NAMES = ("logit_diff", *_VOCABULARY_METRICS)


def find_metric(name: str) -> Metric:
    """Return the metric of this name, or the function at `module:callable`; raises ConfigError if there is none.

    The values of a function of the user's own raise StageError if it fails, or gives anything but one number a row.
    """
    if name == "logit_diff":
        return LogitDiff()
    if name in _VOCABULARY_METRICS:
        return VocabularyMetric(name, _VOCABULARY_METRICS[name])
    return VocabularyMetric(name, _checked(name, _imported(name)))


def metric_source(name: str) -> str | None:
    """Return a hash of the source of a metric of the user's own, None for those that are built in.

    It belongs to the identity of a result: another function under the same name gives another result.
    """
    if name in METRIC_NAMES:
        return None
    function = _imported(name)
    try:
        return content_hash(inspect.getsource(function))
    except (OSError, TypeError):
        return content_hash(name)


def metric_of_logits(metric: Metric, logits: Float[Tensor, "row d_vocab"], pairs: PairInfo) -> Float[Tensor, " row"]:
    """Return the metric of whole rows of logits, whichever of them it reads."""
    return metric.values(logits if metric.needs_all_logits else logits.gather(-1, pairs.choices), pairs)


def _imported(name: str) -> Callable[[Tensor, PairInfo], Tensor]:
    module_name, colon, attribute = name.partition(":")
    if not colon:
        raise ConfigError(
            f"There is no metric {name!r}.{near_names(name, METRIC_NAMES)} Metrics are {', '.join(METRIC_NAMES)}, "
            "or module:callable for a function (logits, pairs) of your own."
        )
    try:
        function = getattr(import_module(module_name), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"The metric {name!r} cannot be imported: {error}.") from error
    if not callable(function):
        raise ConfigError(f"The metric {name!r} is {type(function).__name__}, not a function (logits, pairs).")
    return function  # pyright: ignore[reportReturnType] (the user's)


def _checked(name: str, function: Callable[[Tensor, PairInfo], Tensor]) -> Callable[[Tensor, PairInfo], Tensor]:
    """Return the user's function, float32 at least; it raises StageError unless it gives one number a row."""

    def values(logits: Float[Tensor, "row d_vocab"], pairs: PairInfo) -> Float[Tensor, " row"]:
        try:
            found = function(logits, pairs)
        except Exception as error:
            place, reason = extract_tb(error.__traceback__)[-1], str(error).partition("\n")[0]
            raise StageError(
                f"The metric {name} raised {type(error).__name__}: {reason} ({place.filename}, line {place.lineno})."
            ) from error
        if not isinstance(found, Tensor) or found.shape != logits.shape[:1]:
            shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise StageError(
                f"The metric {name} returned {shape} for logits {tuple(logits.shape)}; it must return a tensor of one "
                f"number a row, {(len(logits),)}."
            )
        return found.to(torch.promote_types(found.dtype, torch.float32))

    return values


def _mean(logits: Float[Tensor, "row token"], tokens: Int[Tensor, "row token"]) -> Float[Tensor, " row"]:
    is_token = tokens != NO_TOKEN
    return logits.where(is_token, 0.0).sum(-1) / is_token.sum(-1)


def _set_probability(logits: Float[Tensor, "row d_vocab"], tokens: Int[Tensor, "row token"]) -> Float[Tensor, " row"]:
    chosen = logits.softmax(-1).gather(-1, tokens.clamp_min(0))
    return chosen.where(tokens != NO_TOKEN, 0.0).sum(-1)


def logit_diff(
    last_logits: Float[Tensor, "pair d_vocab"], answer: Int[Tensor, " pair"], wrong: Int[Tensor, " pair"]
) -> Float[Tensor, " pair"]:
    """Return logit[answer] - logit[wrong] of each row of last-position logits."""
    right = last_logits.gather(-1, answer[:, None]).squeeze(-1)
    return right - last_logits.gather(-1, wrong[:, None]).squeeze(-1)


def recovered_fraction(patched: Values, clean: Values, corrupted: Values) -> Values:
    """Return (patched - corrupted) / (clean - corrupted), the part of the clean metric that denoising restores.

    For the figure of a set of pairs give means over pairs: it is the ratio of means, not the mean of ratios.
    Not a number where clean and corrupted are equal, to the precision of float32.

    >>> float(recovered_fraction(1.0, clean=3.0, corrupted=-1.0))
    0.5
    """
    return _between(patched, corrupted, clean)


def lost_fraction(patched: Values, clean: Values, corrupted: Values) -> Values:
    """Return (patched - clean) / (corrupted - clean), the part of the clean metric that noising destroys.

    Not a number where clean and corrupted are equal, to the precision of float32.

    >>> float(lost_fraction(2.0, clean=3.0, corrupted=-1.0))
    0.25
    """
    return _between(patched, clean, corrupted)


def effect_fraction(patched: Values, clean: Values, corrupted: Values, direction: Direction) -> Values:
    """Return the fraction that belongs to the direction: recovered when denoising, lost when noising."""
    if direction == "denoising":
        return recovered_fraction(patched, clean, corrupted)
    return lost_fraction(patched, clean, corrupted)


def _between(value: Values, start: Values, end: Values) -> Values:
    """Return how far a value is on the way from `start` to `end`, NaN where there is no way."""
    way = end - start
    is_way = np.abs(way) > _EQUAL * (np.abs(start) + np.abs(end))
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.divide(value - start, way) * np.divide(is_way, is_way)  # pyright: ignore[reportReturnType] (kept)
