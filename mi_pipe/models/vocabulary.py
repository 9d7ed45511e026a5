"""Tokens and their text, for HuggingFace tokenizers and for toys whose tokens are numbers."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

_SENTENCEPIECE_SPACE = "\u2581"


class TokenizerVocabulary:
    """A HuggingFace tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        """Wrap `tokenizer`; BOS is its bos token, or else its eos token (as GPT-2 and Pythia use it)."""
        self.tokenizer = tokenizer
        self.size = len(tokenizer)
        self.bos_id = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        added = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.special_ids = frozenset(added | set(tokenizer.all_special_ids))
        self.text = lru_cache(maxsize=None)(self._text)

    def encode(self, text: str) -> list[int]:
        """Return the token ids of `text`, without special tokens."""
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each text, in one call of the tokenizer."""
        if not texts:
            return []
        options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
        return self.tokenizer(list(texts), **options)["input_ids"]

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of tokens together, special tokens included and spaces as they are."""
        return self.tokenizer.decode(list(token_ids), clean_up_tokenization_spaces=False)

    def _text(self, token_id: int) -> str:
        piece = self.tokenizer.convert_ids_to_tokens(int(token_id))
        if isinstance(piece, str) and piece.startswith(_SENTENCEPIECE_SPACE):
            return piece.replace(_SENTENCEPIECE_SPACE, " ")
        return self.tokenizer.decode([int(token_id)])


class NumberVocabulary:
    """The vocabulary of a toy model: token 7 is written " 7"."""

    def __init__(self, size: int) -> None:
        """Make a vocabulary of `size` numbers; it has no BOS."""
        self.size = size
        self.bos_id: int | None = None
        self.special_ids: frozenset[int] = frozenset()

    def encode(self, text: str) -> list[int]:
        """Return the numbers in `text`; raises ValueError if a word is not a token."""
        ids = [int(word) for word in text.split()]
        if any(not 0 <= token_id < self.size for token_id in ids):
            raise ValueError(f"tokens of this toy vocabulary are 0 to {self.size - 1}, got {text!r}")
        return ids

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the numbers in each text."""
        return [self.encode(text) for text in texts]

    def text(self, token_id: int) -> str:
        """Return the number with a leading space."""
        return f" {token_id}"

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the numbers, each with a leading space."""
        return "".join(map(self.text, token_ids))
