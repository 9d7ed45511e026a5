"""Indirect object identification (Wang et al. 2022, arXiv 2211.00593).

"When Mary (IO) and John (S1) arrived at the store, John (S2) gave a ring to" is answered by " Mary". In BABA
templates the subject is named first, in ABBA templates the indirect object. Corruptions:

- `abc`: IO, S1 and S2 become three other names, so that no name is repeated and none is the answer (the paper's ABC);
- `flip`: S2 becomes the IO, so that the right answer is S.

All names are one token with their leading space, so clean and corrupted prompts have equal length.
"""

from typing import Any, Literal

import numpy as np
from pydantic import Field, PositiveInt

from mi_pipe.core.errors import PromptError
from mi_pipe.core.vocabulary import Vocabulary
from mi_pipe.prompts.config import PromptConfig
from mi_pipe.prompts.encoded import EncodedPrompts, encode_single_tokens, encode_texts
from mi_pipe.prompts.inputs import input_digest, read_input
from mi_pipe.prompts.pairs import Pair, encode_pairs, with_bos

_TABLE = "ioi.json"
_N_NAMES = 5
"""A pair needs IO, S, and three others."""
_TOKENS_A_PROMPT = 24


class IOIConfig(PromptConfig):
    """Indirect object identification."""

    family: Literal["ioi"] = "ioi"
    """Which family of prompts."""
    n_pairs: PositiveInt = 100
    """Number of pairs; templates take turns."""
    templates: Literal["ABBA", "BABA", "both"] = "both"
    """Whether the indirect object is named first (ABBA), the subject (BABA), or each in turn."""
    corruption: Literal["abc", "flip"] = "abc"
    """Three other names (abc), or the second subject replaced by the indirect object (flip)."""
    seed: int = Field(default=0, ge=0)
    """Seed of names, places and objects."""

    def identity(self) -> dict[str, Any]:
        """Return the fields, and which table of names and templates."""
        return {**super().identity(), "table": input_digest(_TABLE)}

    @property
    def n_tokens_expected(self) -> int:
        """Tokens of all pairs, about."""
        return 2 * self.n_pairs * _TOKENS_A_PROMPT


def templates(kind: Literal["ABBA", "BABA", "both"]) -> list[tuple[str, str]]:
    """Return name ("BABA 3") and text of each template; ABBA is BABA with the first two names exchanged."""
    baba: list[str] = read_input(_TABLE)["templates_baba"]
    found = {"BABA": baba, "ABBA": [_mirrored(text) for text in baba]}
    kinds = ["ABBA", "BABA"] if kind == "both" else [kind]
    return [(f"{name} {i}", found[name][i]) for i in range(len(baba)) for name in kinds]


def encode_ioi(config: IOIConfig, vocabulary: Vocabulary) -> EncodedPrompts:
    """Return the pairs; positions are `io`, `s1`, `s2` and `end` of the clean prompt.

    Raises PromptError if the tokenizer has too few names of one token.
    """
    table = read_input(_TABLE)
    names, dropped = _usable_names(table["names"], vocabulary)
    rng = np.random.default_rng(config.seed)
    found = templates(config.templates)
    chosen = [rng.choice(len(names), _N_NAMES, replace=False) for _ in range(config.n_pairs)]
    texts = []
    for i, (io, subject, *_) in enumerate(chosen):
        place, thing = rng.choice(table["places"]), rng.choice(table["objects"])
        text = found[i % len(found)][1]
        texts.append(text.format(IO=names[io][0], S=names[subject][0], PLACE=place, OBJECT=thing))
    pairs = []
    for i, tokens in enumerate(encode_texts(vocabulary, texts)):
        ids = [names[k][1] for k in chosen[i]]
        pair = _pair(found[i % len(found)][0], with_bos(vocabulary, tokens, config.prepend_bos), ids, config.corruption)
        if pair is None:
            dropped["a name merges with its neighbour"] = dropped.get("a name merges with its neighbour", 0) + 1
        else:
            pairs.append(pair)
    return encode_pairs(pairs, vocabulary, dropped)


def _pair(source: str, clean: list[int], names: list[int], corruption: str) -> Pair | None:
    io, subject, *others = names
    at_io, at_subject = ([i for i, token in enumerate(clean) if token == name] for name in (io, subject))
    if len(at_io) != 1 or len(at_subject) != 2:  # noqa: PLR2004 (the indirect object once, the subject twice)
        return None
    positions = {"io": at_io[0], "s1": at_subject[0], "s2": at_subject[1], "end": len(clean) - 1}
    new = {"io": others[0], "s1": others[1], "s2": others[2]} if corruption == "abc" else {"s2": io}
    corrupted = list(clean)
    for place, token in new.items():
        corrupted[positions[place]] = token
    return Pair(source, clean, corrupted, io, subject, positions)


def _usable_names(names: list[str], vocabulary: Vocabulary) -> tuple[list[tuple[str, int]], dict[str, int]]:
    """Return names of one token with leading space, and how many are not."""
    found = encode_single_tokens(vocabulary, [f" {name}" for name in names])
    usable = [(name, token) for name, token in zip(names, found, strict=True) if token is not None]
    if len(usable) < _N_NAMES:
        raise PromptError(
            f"Only {len(usable)} of {len(names)} first names are one token of this tokenizer, and the task needs "
            f"{_N_NAMES}. Use family pairs with prompts of your own."
        )
    n_left_out = len(names) - len(usable)
    return usable, {"names of several tokens": n_left_out} if n_left_out else {}


def _mirrored(template: str) -> str:
    """Exchange the first {S} and {IO}."""
    return template.replace("{S}", "{X}", 1).replace("{IO}", "{S}", 1).replace("{X}", "{IO}", 1)
