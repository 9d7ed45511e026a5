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

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of tokens together: a character may be spread over several of them."""
        ...


def texts(vocabulary: Vocabulary, token_ids: Sequence[int]) -> list[str]:
    """Return the text of each token."""
    return [vocabulary.text(int(token_id)) for token_id in token_ids]


def single_token(vocabulary: Vocabulary, text: str) -> int | None:
    """Return the id of the one token that is `text`, or None if it takes several (or none, or an unknown-token)."""
    return spelled_by_one(vocabulary, text, vocabulary.encode(text))


def spelled_by_one(vocabulary: Vocabulary, text: str, token_ids: Sequence[int]) -> int | None:
    """Return the one token of `text` if it has one that reads back as the text; tokenizers may drop what is unknown."""
    if len(token_ids) == 1 and vocabulary.text(token_ids[0]).strip() == text.strip():
        return token_ids[0]
    return None
