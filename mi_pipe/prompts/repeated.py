"""Repeated random tokens: the data on which induction heads can be seen, for toys and for real models.

A sequence is a random block of distinct tokens written again and again. Distinct tokens make the task well posed:
every token of a block has exactly one token that followed it, so that from the second copy on the next token
is certain, and attention to the one place that predicts it can reach 1. (Olsson et al. 2022, "In-context learning
and induction heads"; drawing without replacement is this pipeline's choice.)
"""

from collections.abc import Iterable
from typing import Literal, Self

import numpy as np
import pandas as pd
from jaxtyping import Int
from pydantic import Field, PositiveInt, model_validator

from mi_pipe.core.errors import PromptError
from mi_pipe.core.vocabulary import Vocabulary
from mi_pipe.prompts.config import PromptConfig
from mi_pipe.prompts.encoded import EncodedPrompts, encode_rows
from mi_pipe.prompts.pairs import Pair, encode_pairs, with_bos


class RepeatedConfig(PromptConfig):
    """A corpus of repeated random tokens, to harvest from a toy model."""

    family: Literal["repeated"] = "repeated"
    """Which family of prompts."""
    n_prompts: PositiveInt = 2048
    """Number of sequences."""
    length: int = Field(default=96, ge=4)
    """Tokens of each sequence, BOS not counted."""
    min_period: int = Field(default=6, ge=2)
    """Fewest tokens of a block before it repeats; each sequence draws its own period."""
    max_period: int = Field(default=40, ge=2)
    """Most tokens of a block before it repeats."""
    seed: int = Field(default=0, ge=0)
    """Seed of the random tokens."""

    @model_validator(mode="after")
    def _periods_fit(self) -> Self:
        if not self.min_period <= self.max_period < self.length:
            raise ValueError(
                f"min_period {self.min_period} <= max_period {self.max_period} < length {self.length} must hold"
            )
        return self

    @property
    def n_tokens_expected(self) -> int:
        """Tokens of all sequences, with BOS."""
        return self.n_prompts * (self.length + 1)


class InductionConfig(PromptConfig):
    """Pairs of a repeated random block; the corrupted prompt's first copy differs in one token."""

    family: Literal["induction"] = "induction"
    """Which family of prompts."""
    n_pairs: PositiveInt = 64
    """Number of pairs."""
    period: int = Field(default=20, ge=2)
    """Tokens of the block; prompts have 2 period - 1 of them, and BOS."""
    corruption: Literal["answer", "key"] = "answer"
    """Which token of the first copy is replaced: the answer, so that another one is copied, or the token before it
    (the key that induction heads match), so that there is nothing to copy."""
    seed: int = Field(default=0, ge=0)
    """Seed of the random tokens."""

    @property
    def n_tokens_expected(self) -> int:
        """Tokens of all pairs, with BOS."""
        return 2 * self.n_pairs * 2 * self.period


def ordinary_tokens(vocabulary: Vocabulary) -> Int[np.ndarray, " token"]:
    """Return all tokens but special ones, ascending."""
    special = np.array(sorted(vocabulary.special_ids), np.int64)
    return np.setdiff1d(np.arange(vocabulary.size), special)


def distinct_tokens(
    rng: np.random.Generator, ordinary: Int[np.ndarray, " token"], n_tokens: int
) -> Int[np.ndarray, " token"]:
    """Return `n_tokens` distinct tokens drawn evenly from `ordinary`; raises PromptError if it has too few."""
    if n_tokens > len(ordinary):
        raise PromptError(
            f"A block needs {n_tokens} distinct tokens, and the model's vocabulary has {len(ordinary)} ordinary ones. "
            "Choose a shorter period."
        )
    return ordinary[rng.choice(len(ordinary), n_tokens, replace=False)]


def repeated_tokens(
    rng: np.random.Generator, ordinary: Int[np.ndarray, " token"], length: int, periods: Iterable[int]
) -> Int[np.ndarray, "row pos"]:
    """Return one row a period: a block of that many distinct tokens, repeated and cut to `length`."""
    return np.stack([np.resize(distinct_tokens(rng, ordinary, int(period)), length) for period in periods])


def random_periods(rng: np.random.Generator, low: int, high: int, n_rows: int) -> Int[np.ndarray, " row"]:
    """Return periods drawn evenly from low to high, both included."""
    return rng.integers(low, high + 1, n_rows)


def encode_repeated(config: RepeatedConfig, vocabulary: Vocabulary) -> EncodedPrompts:
    """Return the sequences; `period` is a column of the table."""
    rng = np.random.default_rng(config.seed)
    periods = random_periods(rng, config.min_period, config.max_period, config.n_prompts)
    rows = repeated_tokens(rng, ordinary_tokens(vocabulary), config.length, periods)
    table = pd.DataFrame({"source": ["repeated"] * len(rows), "period": periods.astype(np.int32)})
    return encode_rows([np.asarray(with_bos(vocabulary, row, config.prepend_bos)) for row in rows], table, {})


def encode_induction(config: InductionConfig, vocabulary: Vocabulary) -> EncodedPrompts:
    """Return pairs of s0 … sn-1 s0 … sn-2, answered by sn-1.

    Corrupted prompts have another sn-1, which is their own answer, or (`key`) another sn-2 in the first copy alone:
    then the last token has no earlier occurrence, and the wrong answer is s0.

    Positions: `answer` (the token to copy, in the first copy), `earlier` (where the last token stood before it)
    and `end`.
    """
    rng = np.random.default_rng(config.seed)
    ordinary = ordinary_tokens(vocabulary)
    pairs = [_induction_pair(config, vocabulary, rng, ordinary) for _ in range(config.n_pairs)]
    return encode_pairs(pairs, vocabulary, {})


def _induction_pair(
    config: InductionConfig, vocabulary: Vocabulary, rng: np.random.Generator, ordinary: Int[np.ndarray, " token"]
) -> Pair:
    *block, other = distinct_tokens(rng, ordinary, config.period + 1).tolist()
    *start, answer = block
    if config.corruption == "answer":
        first_copy, wrong = [*start, other], other
    else:
        first_copy, wrong = [*start[:-1], other, answer], start[0]
    clean = with_bos(vocabulary, [*block, *start], config.prepend_bos)
    corrupted = with_bos(vocabulary, [*first_copy, *start], config.prepend_bos)
    first = len(clean) - (2 * config.period - 1)
    positions = {"earlier": first + config.period - 2, "answer": first + config.period - 1, "end": len(clean) - 1}
    return Pair("repeated block", clean, corrupted, answer, wrong, positions)
