"""The read side of `generate_prompts`: tokens, prompts, and pairs ready to be run as batches."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor

from mi_pipe.core.artifact import Artifact
from mi_pipe.core.errors import PromptError

TOKENS_FILE = "tokens.parquet"
PROMPTS_FILE = "prompts.parquet"
DROPPED_FILE = "dropped.json"
PLACE_PREFIX = "pos_"
"""Begins the columns with the positions of named places."""


@dataclass(frozen=True)
class PairGroup:
    """Pairs of one length, as batches; every metric is read at the last position."""

    pairs: Int[np.ndarray, " pair"]
    """Numbers of the pairs, ascending."""
    clean: Int[Tensor, "pair pos"]
    corrupted: Int[Tensor, "pair pos"]
    answer: Int[Tensor, " pair"]
    """The token that follows the clean prompt."""
    wrong: Int[Tensor, " pair"]
    """The token that the metric sets against it."""
    labels: list[str]
    """The text of each token of the first clean prompt."""
    sources: tuple[str, ...] = ()
    """Template, relation or line that each pair came from; empty if unknown."""
    places: Mapping[str, Int[np.ndarray, " pair"]] = field(default_factory=dict)
    """Position of each named place of the clean prompts, -1 where a pair has none."""

    @property
    def templates(self) -> tuple[str, ...]:
        """What each pair came from, "" where that is unknown."""
        return self.sources or ("",) * self.n_pairs

    @property
    def n_pairs(self) -> int:
        """Number of pairs."""
        return len(self.pairs)

    @property
    def n_pos(self) -> int:
        """Number of tokens of every prompt of the group."""
        return self.clean.shape[1]


class PromptSet(Artifact):
    """Tokenised prompts: a corpus in windows, or a task in clean and corrupted pairs."""

    @property
    def family(self) -> str:
        """What the prompts are: corpus, repeated, induction, ioi, facts or pairs."""
        return self.config["family"]

    @property
    def has_pairs(self) -> bool:
        """Say whether this is a task."""
        return "pair" in self.prompts.columns

    @cached_property
    def prompts(self) -> pd.DataFrame:
        """`prompts.parquet`, one row a prompt."""
        return self.read_table(PROMPTS_FILE)

    @property
    def n_prompts(self) -> int:
        """Number of prompts."""
        return len(self.prompts)

    @property
    def n_tokens(self) -> int:
        """Number of tokens of all prompts."""
        return int(self.offsets[-1])

    @cached_property
    def token_ids(self) -> Int[np.ndarray, " token"]:
        """The tokens of all prompts after one another, int32."""
        return self.read_table(TOKENS_FILE, ["token_id"])["token_id"].to_numpy(np.int32)

    @cached_property
    def offsets(self) -> Int[np.ndarray, " boundary"]:
        """Where each prompt begins in `token_ids`, and where the last ends; int64."""
        return np.concatenate([[0], np.cumsum(self.prompts["n_tokens"].to_numpy(np.int64))])

    @property
    def dropped(self) -> dict[str, int]:
        """Reason to number of prompts that the tokenizer could not express."""
        return self.read_json(DROPPED_FILE)

    def prompt(self, i: int) -> Int[np.ndarray, " pos"]:
        """Return the tokens of one prompt, int32; raises IndexError beyond the last."""
        if not 0 <= i < self.n_prompts:
            raise IndexError(f"prompt {i} of {self.id}, which has prompts 0 to {self.n_prompts - 1}")
        return self.token_ids[self.offsets[i] : self.offsets[i + 1]]

    def token_table(self) -> pd.DataFrame:
        """`tokens.parquet`, one row a token."""
        return self.read_table(TOKENS_FILE)

    def texts(self, i: int) -> list[str]:
        """Return the text of each token of one prompt."""
        rows = slice(int(self.offsets[i]), int(self.offsets[i + 1]))
        return [str(text) for text in self._texts[rows]]

    def pair_groups(self) -> list[PairGroup]:
        """Return the pairs by length, shortest first; raises PromptError if these prompts are no pairs."""
        if not self.has_pairs:
            raise PromptError(
                f"{self.id} is a {self.family} prompt set without clean and corrupted pairs. "
                "Use one of the families induction, ioi, facts or pairs."
            )
        clean = self.prompts.query("role == 'clean'")
        return [self._group(rows) for _, rows in clean.groupby("n_tokens", sort=True)]

    def _group(self, clean: pd.DataFrame) -> PairGroup:
        first = clean["prompt_idx"].to_numpy(np.int64)
        return PairGroup(
            pairs=clean["pair"].to_numpy(np.int64),
            clean=self._batch(first),
            corrupted=self._batch(first + 1),
            answer=torch.from_numpy(clean["answer_id"].to_numpy(np.int64)),
            wrong=torch.from_numpy(clean["wrong_id"].to_numpy(np.int64)),
            labels=self.texts(int(first[0])),
            sources=tuple(map(str, clean["source"])),
            places={
                name.removeprefix(PLACE_PREFIX): clean[name].fillna(-1).to_numpy(np.int64)
                for name in clean.columns
                if name.startswith(PLACE_PREFIX)
            },
        )

    def _batch(self, indices: Int[np.ndarray, " pair"]) -> Int[Tensor, "pair pos"]:
        return torch.from_numpy(np.stack([self.prompt(int(i)) for i in indices]).astype(np.int64))

    @cached_property
    def _texts(self) -> pd.Categorical:
        return self.read_table(TOKENS_FILE, ["text"])["text"].array  # pyright: ignore[reportReturnType]
