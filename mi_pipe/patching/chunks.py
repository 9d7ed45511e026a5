"""Which pairs a sweep takes, and in which batches: a batch of pairs is what is run, stored and resumed together."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from mi_pipe.core.errors import PromptError
from mi_pipe.models.info import ModelInfo
from mi_pipe.prompts.prompt_set import PairGroup

# Part of the plan, not of the result: large enough to fill a forward pass, small enough to hold all layers.
PAIRS_PER_CHUNK = 16


@dataclass(frozen=True)
class Chunk:
    """A few pairs of one length."""

    name: str
    group: PairGroup
    rows: slice
    """Their place among the chosen pairs, which are ordered by length and then by number."""


def choose_pairs(groups: list[PairGroup], max_pairs: int | None) -> list[PairGroup]:
    """Keep the pairs with the lowest numbers, at most `max_pairs`, in groups of one length."""
    if not groups:
        return []
    numbers = np.sort(np.concatenate([group.pairs for group in groups]))[:max_pairs]
    kept = ((group, np.flatnonzero(np.isin(group.pairs, numbers))) for group in groups)
    return [take(group, rows) for group, rows in kept if len(rows)]


def take(group: PairGroup, rows: np.ndarray) -> PairGroup:
    """Return the group of these rows alone; `labels` stay those of the whole group's first prompt."""
    return replace(
        group,
        pairs=group.pairs[rows],
        clean=group.clean[rows],
        corrupted=group.corrupted[rows],
        answer=group.answer[rows],
        wrong=group.wrong[rows],
        sources=tuple(group.sources[int(row)] for row in rows) if group.sources else (),
        places={name: positions[rows] for name, positions in group.places.items()},
    )


def chunks_of(groups: list[PairGroup], size: int = PAIRS_PER_CHUNK) -> list[Chunk]:
    """Cut every group into chunks of at most `size` pairs."""
    chunks: list[Chunk] = []
    first = 0
    for group in groups:
        for start in range(0, group.n_pairs, size):
            rows = np.arange(start, min(start + size, group.n_pairs))
            name = f"{group.n_pos}tokens.{start // size:04d}"
            chunks.append(Chunk(name, take(group, rows), slice(first + start, first + start + len(rows))))
        first += group.n_pairs
    return chunks


def check_fits(groups: Sequence[PairGroup], info: ModelInfo, task: str) -> None:
    """Raise PromptError if a prompt is longer than the model's context or has tokens that it does not know."""
    if not groups:
        raise PromptError(f"Task {task} has no pairs left for this tokenizer; see its dropped.json for the reasons.")
    longest = max(group.n_pos for group in groups)
    if longest > info.n_ctx:
        raise PromptError(f"Task {task} has prompts of {longest} tokens; the model's context is {info.n_ctx}.")
    largest = max(int(max(group.clean.max(), group.corrupted.max())) for group in groups)
    if largest >= info.d_vocab:
        raise PromptError(
            f"Task {task} has token {largest}, and the model has {info.d_vocab} tokens: "
            "it was made with another model's tokenizer. Generate its prompts for this model."
        )
