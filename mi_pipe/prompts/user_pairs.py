"""A task of the user's own: JSON lines with `clean`, `corrupted`, `answer` and `wrong`.

Texts are taken as they stand: an answer that follows a space is written with it, " Mary". The file is known by its
content, and what does not fit is an error with its line, for nobody but the author can mend it.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from mi_pipe.core.config import Execution
from mi_pipe.core.errors import PromptError
from mi_pipe.core.vocabulary import Vocabulary, single_token, texts
from mi_pipe.prompts.config import PromptConfig
from mi_pipe.prompts.encoded import EncodedPrompts
from mi_pipe.prompts.pairs import Pair, encode_pairs, with_bos
from mi_pipe.prompts.text_files import json_lines, known_content, known_digest

_FIELDS = ("clean", "corrupted", "answer", "wrong")
_OPTIONAL = ("name",)


class PairsConfig(PromptConfig):
    """Pairs from a file."""

    family: Literal["pairs"] = "pairs"
    """Which family of prompts."""
    path: Annotated[Path, Execution()]
    """JSON lines with the texts clean, corrupted, answer and wrong, and if wanted name (a template or kind)."""

    def identity(self) -> dict[str, Any]:
        """Return the file's content hash instead of its path; raises PromptError if it is missing or empty."""
        return {**super().identity(), "content": known_digest(self.path)}

    @property
    def n_tokens_expected(self) -> int:
        """At most one token a byte."""
        return len(known_content(self.path))


def encode_user_pairs(config: PairsConfig, vocabulary: Vocabulary) -> EncodedPrompts:
    """Return the pairs; raises PromptError naming the line for a missing or unknown field, prompts of different
    lengths, or an answer that is not one token.
    """
    pairs = []
    for number, entry in json_lines(config.path, known_content(config.path)):
        where = f"{config.path}, line {number}"
        _check_fields(entry, where)
        try:
            pairs.append(_pair(entry, where, vocabulary, config.prepend_bos))
        except PromptError:
            raise
        except ValueError as error:
            raise PromptError(f"{where}: {error}.") from error
    if not pairs:
        raise PromptError(f"{config.path} has no pair: every line is blank.")
    return encode_pairs(pairs, vocabulary, {})


def _check_fields(entry: dict[str, Any], where: str) -> None:
    for name in _FIELDS:
        if not isinstance(entry.get(name), str) or not entry[name]:
            raise PromptError(f"{where}: the field {name!r} is missing or no text; a pair has {', '.join(_FIELDS)}.")
    for name in entry:
        if name not in (*_FIELDS, *_OPTIONAL):
            raise PromptError(f"{where}: unknown field {name!r}; a pair has {', '.join((*_FIELDS, *_OPTIONAL))}.")


def _pair(entry: dict[str, Any], where: str, vocabulary: Vocabulary, prepend_bos: bool) -> Pair:
    clean, corrupted = (with_bos(vocabulary, vocabulary.encode(entry[name]), prepend_bos) for name in _FIELDS[:2])
    if len(clean) != len(corrupted):
        raise PromptError(
            f"{where}: clean has {len(clean)} tokens and corrupted {len(corrupted)}. Word them so that both have "
            "the same number, for patching goes position by position."
        )
    if clean == corrupted:
        raise PromptError(f"{where}: clean and corrupted are the same tokens, so that there is nothing to patch.")
    answer, wrong = (_one_token(entry[name], name, where, vocabulary) for name in _FIELDS[2:])
    if answer == wrong:
        raise PromptError(f"{where}: answer and wrong are the same token {entry['answer']!r}.")
    return Pair(str(entry.get("name", "pairs")), clean, corrupted, answer, wrong, {"end": len(clean) - 1})


def _one_token(text: str, name: str, where: str, vocabulary: Vocabulary) -> int:
    token = single_token(vocabulary, text)
    if token is not None:
        return token
    ids = vocabulary.encode(text)
    spaced = f" {text}"
    is_one = single_token(vocabulary, spaced) is not None
    hint = f"With a leading space, {spaced!r}, it is one." if is_one else "Choose another."
    pieces = ", ".join(map(repr, texts(vocabulary, ids)))
    raise PromptError(f"{where}: the {name} {text!r} is {len(ids)} tokens ({pieces}) and must be one. {hint}")
