"""Tokens and their text: what prompts and reports need to know of a tokenizer."""

from collections.abc import Sequence
from typing import Protocol


class Vocabulary(Protocol):
    """What the pipeline needs of a tokenizer."""

    size: int
    bos_id: int | None
    special_ids: frozenset[int]
    """Tokens that are marks (BOS, chat roles, padding) and no text."""

    def encode(self, text: str) -> list[int]:
        """Return the token ids of `text`, without BOS or other special tokens."""
        ...

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each text as `encode` does, at the speed of one batch."""
        ...

    def text(self, token_id: int) -> str:
        """Return the text of one token, its leading space kept."""
        ...


def texts(vocabulary: Vocabulary, token_ids: Sequence[int]) -> list[str]:
    """Return the text of each token."""
    return [vocabulary.text(int(token_id)) for token_id in token_ids]


def single_token(vocabulary: Vocabulary, text: str) -> int | None:
    """Return the id of the one token that is `text`, or None if it takes several (or none)."""
    ids = vocabulary.encode(text)
    return ids[0] if len(ids) == 1 else None
