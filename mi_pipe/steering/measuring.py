"""What steering does to a metric of the answer and to the loss on text, by prompt and coefficient.

Runs that differ by coefficient and prompt alone are the rows of one batch, as many as fit into `batch_tokens`; they
begin at the block where the direction is added (mi_pipe/patching/known_blocks.py).
Coefficient 0 is the model without any hook: its figures are the model's own, bit for bit.

Loss is the mean cross-entropy of a prompt's tokens after the first, in nats; perplexity is exp of its mean over tokens.
"""

from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy

from mi_pipe.models.model import Model, as_logits
from mi_pipe.patching.known_blocks import KnownBlocks
from mi_pipe.patching.metrics import Metric, PairInfo, metric_of_logits
from mi_pipe.patching.readout import last_logits
from mi_pipe.prompts.prompt_set import PairGroup
from mi_pipe.steering.adding import added
from mi_pipe.steering.direction import Direction


@torch.no_grad()
def metric_values(
    model: Model,
    directions: Sequence[Direction],
    coefficients: Sequence[float],
    group: PairGroup,
    metric: Metric,
    from_end: bool,
    batch_tokens: int,
) -> Float[np.ndarray, "direction coefficient pair"]:
    """Return the metric at the last position of clean prompts of one length; float32.

    With `from_end` the direction is added at the last position alone, else at every position.
    """
    tokens = group.clean.to(model.device)
    known = KnownBlocks(model, [direction.hook for direction in directions])
    logits = known.base(partial(last_logits, model), tokens, batch_tokens // group.n_pos)
    answers, wrongs = (ids[:, None].to(model.device) for ids in (group.answer, group.wrong))
    info = PairInfo(answers, wrongs, logits if metric.needs_all_logits else None)
    found = np.empty((len(directions), len(coefficients), group.n_pairs), np.float32)
    found[:] = metric_of_logits(metric, logits, info).float().cpu().numpy()
    for i, direction in enumerate(directions):
        for cells in _cells(coefficients, group.n_pairs, batch_tokens // group.n_pos):
            steps, rows = _steps(direction, coefficients, cells), torch.from_numpy(cells[:, 1]).to(model.device)
            first_pos = group.n_pos - 1 if from_end else 0
            with known.left_out(direction.hook, rows), added(model, direction.hook, steps.to(model.device), first_pos):
                steered = last_logits(model, tokens[rows])
            values = metric_of_logits(metric, steered, info.rows(rows)).float().cpu().numpy()
            found[i, cells[:, 0], cells[:, 1]] = values
    return found


@torch.no_grad()
def text_losses(
    model: Model,
    directions: Sequence[Direction],
    coefficients: Sequence[float],
    tokens: Int[Tensor, "prompt pos"],
    batch_tokens: int,
) -> Float[np.ndarray, "direction coefficient prompt"]:
    """Return the mean loss of each prompt, in nats a token, with the direction added at every position; float32."""
    tokens = tokens.to(model.device)
    n_prompts, n_pos = tokens.shape
    known = KnownBlocks(model, [direction.hook for direction in directions])
    base = known.base(partial(_losses, model), tokens, batch_tokens // n_pos)
    found = np.empty((len(directions), len(coefficients), n_prompts), np.float32)
    found[:] = base.cpu().numpy()
    for i, direction in enumerate(directions):
        for cells in _cells(coefficients, n_prompts, batch_tokens // n_pos):
            steps, rows = _steps(direction, coefficients, cells), torch.from_numpy(cells[:, 1]).to(model.device)
            with known.left_out(direction.hook, rows), added(model, direction.hook, steps.to(model.device)):
                found[i, cells[:, 0], cells[:, 1]] = _losses(model, tokens[rows]).cpu().numpy()
    return found


def _losses(model: Model, tokens: Int[Tensor, "row pos"]) -> Float[Tensor, " row"]:
    """Return each row's mean loss; row by row, since the softmax of all rows would need as much memory again."""
    logits = as_logits(model.module(tokens))
    rows = [
        cross_entropy(row[:-1].float(), ids[1:], reduction="none").double().mean()
        for row, ids in zip(logits, tokens, strict=True)
    ]
    return torch.stack(rows)


def _cells(coefficients: Sequence[float], n_prompts: int, n_rows: int) -> Iterator[Int[np.ndarray, "row 2"]]:
    """Yield (number of a coefficient other than 0, number of a prompt) in batches of at most `n_rows`."""
    moving = [k for k, coefficient in enumerate(coefficients) if coefficient]
    cells = np.stack(np.meshgrid(moving, np.arange(n_prompts), indexing="ij"), axis=-1).reshape(-1, 2).astype(np.int64)
    size = max(1, n_rows)
    for start in range(0, len(cells), size):
        yield cells[start : start + size]


def _steps(
    direction: Direction, coefficients: Sequence[float], cells: Int[np.ndarray, "row 2"]
) -> Float[Tensor, "row d"]:
    return torch.stack([direction.step(coefficients[k]) for k in cells[:, 0]])
