"""Texts written under steering, for every coefficient and prompt: one table."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch

from mi_pipe.core.errors import ConfigError
from mi_pipe.core.vocabulary import Vocabulary
from mi_pipe.models.model import Model
from mi_pipe.steering.batches import BATCH_TOKENS, Batch, Tokens, by_length
from mi_pipe.steering.direction import Direction
from mi_pipe.steering.generation import Push, Sampling, continuations, uniform_draws

GREEDY = -1
"""The number of the greedy continuation among a prompt's samples."""


@dataclass(frozen=True)
class Writing:
    """How much is written, and how tokens are chosen."""

    n_tokens: int = 32
    n_samples: int = 0
    """Sampled continuations of each prompt and coefficient, beside the greedy one."""
    temperature: float = 1.0
    seed: int = 0
    from_end: bool = False
    """Whether to steer from the prompt's last token on, instead of at every position."""
    batch_tokens: int = BATCH_TOKENS

    def __post_init__(self) -> None:
        """Raise ConfigError for what cannot be written."""
        if self.n_tokens < 1 or self.n_samples < 0 or not 0 < self.temperature < float("inf"):
            raise ConfigError(
                f"{self.n_tokens} tokens and {self.n_samples} samples at temperature {self.temperature:g} cannot be "
                "written: at least one token, no fewer than 0 samples, a temperature above 0."
            )


@dataclass(frozen=True)
class _Cell:
    """One continuation: numbers of the prompt in its batch and of the sample, and the coefficient."""

    coefficient: float
    row: int
    sample: int


def steered_texts(
    model: Model,
    direction: Direction | None,
    coefficients: Sequence[float],
    prompts: Sequence[Tokens],
    writing: Writing,
) -> pd.DataFrame:
    """Return one row a coefficient, prompt and sample: `token_ids` and `text` of what follows the prompt.

    Rows of coefficient 0 are the model's own, run without any hook; without a direction there are no others.
    """
    found: list[dict[str, object]] = []
    for batch in by_length(prompts, writing.batch_tokens):
        for moves in (False, True):
            if moves and direction is None:
                continue
            wanted = [coefficient for coefficient in coefficients if bool(coefficient) == moves]
            for cells in _in_memory(list(_cells(wanted, batch, writing)), batch, writing):
                found += _written(model, direction if moves else None, batch, cells, writing)
    columns = ["coefficient", "prompt", "sample", "token_ids", "text"]
    frame = pd.DataFrame(found, columns=columns).sort_values(columns[:3], ignore_index=True)
    return frame.astype({"prompt": np.int32, "sample": np.int32})


def _cells(coefficients: Sequence[float], batch: Batch, writing: Writing) -> Iterator[_Cell]:
    for coefficient in coefficients:
        for row in range(len(batch.rows)):
            yield from (_Cell(coefficient, row, sample) for sample in range(GREEDY, writing.n_samples))


def _in_memory(cells: list[_Cell], batch: Batch, writing: Writing) -> Iterator[list[_Cell]]:
    size = max(1, writing.batch_tokens // (batch.tokens.shape[1] + writing.n_tokens))
    for start in range(0, len(cells), size):
        yield cells[start : start + size]


def _written(
    model: Model, direction: Direction | None, batch: Batch, cells: Sequence[_Cell], writing: Writing
) -> list[dict[str, object]]:
    tokens = batch.tokens[[cell.row for cell in cells]]
    push = None
    if direction is not None:
        vectors = torch.stack([direction.step(cell.coefficient) for cell in cells])
        push = Push(direction.hook, vectors, writing.from_end)
    numbers = [int(batch.rows[cell.row]) for cell in cells]
    draws = [
        np.full(writing.n_tokens, np.nan)
        if cell.sample == GREEDY
        else uniform_draws(writing.seed, number, cell.sample, writing.n_tokens)
        for cell, number in zip(cells, numbers, strict=True)
    ]
    rows = continuations(model, tokens, Sampling(np.stack(draws), writing.temperature), push)
    return [_row(cell, number, ids, model.vocabulary) for cell, number, ids in zip(cells, numbers, rows, strict=True)]


def _row(cell: _Cell, prompt: int, ids: list[int], vocabulary: Vocabulary) -> dict[str, object]:
    row: dict[str, object] = {"coefficient": cell.coefficient, "prompt": prompt, "sample": cell.sample}
    return {**row, "token_ids": np.array(ids, np.int32), "text": vocabulary.decode(ids)}
