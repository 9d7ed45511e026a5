"""Factual recall: "The capital of the country France is the city of" is answered by " Paris".

The corrupted prompt asks the same of another subject whose name takes as many tokens and whose answer differs; that
answer is the wrong one. Answers of several tokens, and subjects that no other has the length of, are left out.
"""

from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
from pydantic import Field, PositiveInt, model_validator

from mi_pipe.core.errors import PromptError, near_names
from mi_pipe.core.vocabulary import Vocabulary
from mi_pipe.prompts.config import PromptConfig
from mi_pipe.prompts.encoded import EncodedPrompts, encode_single_tokens, encode_texts
from mi_pipe.prompts.inputs import input_digest, read_input
from mi_pipe.prompts.pairs import Pair, encode_pairs, with_bos

_TABLE = "facts.json"
_SUBJECT = "{subject}"
_TOKENS_A_PROMPT = 16


class FactsConfig(PromptConfig):
    """Factual recall from a table of subjects and answers."""

    family: Literal["facts"] = "facts"
    """Which family of prompts."""
    n_pairs: PositiveInt = 100
    """Most pairs; a fact comes again, with another partner, only when all have come."""
    relations: tuple[str, ...] | None = None
    """Relations of `data/inputs/facts.json`, such as capital; none named means all."""
    seed: int = Field(default=0, ge=0)
    """Seed of the order of facts and of their partners."""

    @model_validator(mode="after")
    def _relations_exist(self) -> Self:
        known = read_input(_TABLE)
        for name in self.relations or ():
            if name not in known:
                raise ValueError(
                    f"there is no relation {name!r}.{near_names(name, known)} The relations are {', '.join(known)}"
                )
        return self

    def identity(self) -> dict[str, Any]:
        """Return the fields, and which table of facts."""
        return {**super().identity(), "table": input_digest(_TABLE)}

    @property
    def n_tokens_expected(self) -> int:
        """Tokens of all pairs, about."""
        return 2 * self.n_pairs * _TOKENS_A_PROMPT


@dataclass(frozen=True)
class _Fact:
    relation: str
    tokens: tuple[int, ...]
    answer: int
    pos_subject: int

    @property
    def kind(self) -> tuple[str, int, int]:
        """Facts of one kind can be each other's corruption: position by position their prompts mean the same."""
        return self.relation, len(self.tokens), self.pos_subject


def encode_facts(config: FactsConfig, vocabulary: Vocabulary) -> EncodedPrompts:
    """Return the pairs; positions are `subject` (its last token) and `end`. Raises PromptError if there are none."""
    dropped: Counter[str] = Counter()
    table = read_input(_TABLE)
    facts = [fact for name in config.relations or table for fact in _facts(name, table[name], vocabulary, dropped)]
    rng = np.random.default_rng(config.seed)
    pairs = [_pair(*both, config, vocabulary) for both in _partnered(facts, rng, config.n_pairs, dropped)]
    if not pairs:
        raise PromptError("No fact can be asked: every answer takes several tokens of this tokenizer.")
    return encode_pairs(pairs, vocabulary, dict(dropped))


def _facts(relation: str, entry: dict[str, Any], vocabulary: Vocabulary, dropped: Counter[str]) -> list[_Fact]:
    template: str = entry["template"]
    start = template[: template.index(_SUBJECT)]
    rows: list[dict[str, str]] = entry["facts"]
    answers = encode_single_tokens(vocabulary, [f" {row['answer']}" for row in rows])
    prompts = encode_texts(vocabulary, [template.replace(_SUBJECT, row["subject"]) for row in rows])
    begun = encode_texts(vocabulary, [start + row["subject"] for row in rows])
    found = []
    for answer, tokens, beginning in zip(answers, prompts, begun, strict=True):
        if answer is None:
            dropped["answer of several tokens"] += 1
        else:
            found.append(_Fact(relation, tuple(tokens), answer, len(beginning) - 1))
    return found


def _partnered(
    facts: list[_Fact], rng: np.random.Generator, n_pairs: int, dropped: Counter[str]
) -> list[tuple[_Fact, _Fact]]:
    """Return (fact, partner) in rounds: each fact once, then each once more with its next partner, and so on."""
    alike: defaultdict[tuple[str, int, int], list[_Fact]] = defaultdict(list)
    for fact in facts:
        alike[fact.kind].append(fact)
    partners = []
    for i in rng.permutation(len(facts)):
        others = [other for other in alike[facts[i].kind] if other.answer != facts[i].answer]
        if others:
            partners.append((facts[i], [others[k] for k in rng.permutation(len(others))]))
        else:
            dropped["no partner of equal length"] += 1
    n_rounds = max((len(others) for _, others in partners), default=0)
    found = [(fact, others[r]) for r in range(n_rounds) for fact, others in partners if r < len(others)]
    return found[:n_pairs]


def _pair(fact: _Fact, partner: _Fact, config: FactsConfig, vocabulary: Vocabulary) -> Pair:
    clean, corrupted = (with_bos(vocabulary, item.tokens, config.prepend_bos) for item in (fact, partner))
    positions = {"subject": fact.pos_subject + len(clean) - len(fact.tokens), "end": len(clean) - 1}
    return Pair(fact.relation, clean, corrupted, fact.answer, partner.answer, positions)
