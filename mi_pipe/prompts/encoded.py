"""Prompts as numbers, before they are stored: flat token ids, offsets, and one table row a prompt.

The token table is built without a loop over tokens: each distinct token's text is looked up once, and the
text column is a dictionary of these with codes.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from jaxtyping import Int

from mi_pipe.core.errors import PromptError
from mi_pipe.core.vocabulary import Vocabulary, spelled_by_one, texts


@dataclass(frozen=True)
class EncodedPrompts:
    """Prompts ready to be written; prompt i holds `token_ids[offsets[i] : offsets[i + 1]]`."""

    token_ids: Int[np.ndarray, " token"]
    """int32, all prompts after one another."""
    offsets: Int[np.ndarray, " boundary"]
    """int64, n_prompts + 1 of them."""
    table: pd.DataFrame
    """One row a prompt: the columns of `prompts.parquet` after `prompt_idx` and `n_tokens`."""
    dropped: dict[str, int] = field(default_factory=dict)
    """Reason to number of prompts left out."""

    @property
    def n_prompts(self) -> int:
        """Number of prompts."""
        return len(self.offsets) - 1

    @property
    def n_tokens(self) -> int:
        """Number of tokens of all prompts."""
        return len(self.token_ids)

    def prompt_frame(self) -> pd.DataFrame:
        """Return `prompts.parquet`: `prompt_idx` and `n_tokens` (int32), then the table's columns."""
        frame = self.table.reset_index(drop=True)
        frame.insert(0, "n_tokens", np.diff(self.offsets).astype(np.int32))
        frame.insert(0, "prompt_idx", np.arange(self.n_prompts, dtype=np.int32))
        return frame

    def token_frame(self, vocabulary: Vocabulary) -> pd.DataFrame:
        """Return `tokens.parquet`: `prompt_idx`, `pos`, `token_id` (int32) and `text` (categorical)."""
        lengths = np.diff(self.offsets)
        starts = np.repeat(self.offsets[:-1], lengths)
        return pd.DataFrame(
            {
                "prompt_idx": np.repeat(np.arange(self.n_prompts, dtype=np.int32), lengths),
                "pos": (np.arange(self.n_tokens) - starts).astype(np.int32),
                "token_id": self.token_ids,
                "text": text_column(self.token_ids, vocabulary),
            }
        )


def encode_rows(
    rows: Iterable[Int[np.ndarray, " token"]], table: pd.DataFrame, dropped: dict[str, int]
) -> EncodedPrompts:
    """Return the prompts of token rows, one table row each."""
    rows = list(rows)
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64)
    token_ids = np.concatenate(rows).astype(np.int32) if rows else np.zeros(0, np.int32)
    return EncodedPrompts(token_ids, offsets, table, dropped)


def text_column(token_ids: Int[np.ndarray, " token"], vocabulary: Vocabulary) -> pd.Categorical:
    """Return the text of each token, stored once a distinct text."""
    distinct, which = np.unique(token_ids, return_inverse=True)
    text_of, categories = pd.factorize(np.array(texts(vocabulary, distinct.tolist()), dtype=object))
    return pd.Categorical.from_codes(text_of[which], categories=[str(text) for text in categories])


def encode_texts(vocabulary: Vocabulary, lines: Sequence[str]) -> list[list[int]]:
    """Return the tokens of each text; raises PromptError if the model's tokens are no text at all."""
    try:
        return vocabulary.encode_many(lines)
    except ValueError as error:
        raise PromptError(
            "The model reads numbers, not text. Use the families repeated and induction with it, or another model."
        ) from error


def encode_single_tokens(vocabulary: Vocabulary, words: Sequence[str]) -> list[int | None]:
    """Return the one token of each word, or None; raises as `encode_texts` does."""
    encoded = encode_texts(vocabulary, words)
    return [spelled_by_one(vocabulary, word, ids) for word, ids in zip(words, encoded, strict=True)]
