"""The held-out side of a store: rows for metrics, and prompts with the positions at which an SAE may stand in.

Which prompts are held out is decided by the store (by prompt, the same for all users); here only how many are used.
"""

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mi_pipe.activations.store import ActivationStore
from mi_pipe.prompts.prompt_set import PromptSet
from mi_pipe.saes.evaluation import PromptBatch, pad_prompts


def held_out_rows(
    store: ActivationStore, hook: str, held_out_fraction: float, seed: int, n_rows: int
) -> Int[np.ndarray, " row"]:
    """Return up to `n_rows` held-out rows that are not massive, spread evenly, ascending."""
    _, held_out = store.prompt_split(held_out_fraction, seed)
    return _spread(np.flatnonzero(held_out & ~store.massive(hook)), n_rows)


def read_rows(
    store: ActivationStore, hook: str, rows: Int[np.ndarray, " row"], batch_rows: int
) -> list[Float[Tensor, "batch d_in"]]:
    """Return the activations of some rows in batches."""
    starts = range(0, len(rows), batch_rows)
    return [torch.from_numpy(store.take(hook, rows[start : start + batch_rows])) for start in starts]


def held_out_prompts(
    store: ActivationStore,
    prompts: PromptSet,
    hook: str,
    held_out_fraction: float,
    seed: int,
    n_prompts: int,
    bos_id: int | None,
    batch_prompts: int,
) -> list[PromptBatch]:
    """Return up to `n_prompts` held-out prompts in batches.

    They are marked where the store has a row that is neither massive nor BOS.
    """
    _, held_out = store.prompt_split(held_out_fraction, seed)
    table = store.table(["prompt_idx", "pos"])
    prompt_idx, pos = table["prompt_idx"].to_numpy(), table["pos"].to_numpy()
    usable = held_out & ~store.massive(hook)
    chosen = _spread(np.unique(prompt_idx[held_out]), n_prompts)
    tokens = [torch.from_numpy(prompts.prompt(int(i)).astype(np.int64)) for i in chosen]
    marks = [_mark(ids, pos[usable & (prompt_idx == i)], bos_id) for i, ids in zip(chosen, tokens, strict=True)]
    starts = range(0, len(tokens), batch_prompts)
    return [pad_prompts(tokens[i : i + batch_prompts], marks[i : i + batch_prompts]) for i in starts]


def _mark(
    tokens: Int[Tensor, " pos"], positions: Int[np.ndarray, " marked"], bos_id: int | None
) -> Bool[Tensor, " pos"]:
    marked = torch.zeros_like(tokens, dtype=torch.bool)
    marked[torch.from_numpy(positions.astype(np.int64))] = True
    return marked if bos_id is None else marked & ~((tokens == bos_id) & (torch.arange(len(tokens)) == 0))


def _spread(values: Int[np.ndarray, " value"], n: int) -> Int[np.ndarray, " chosen"]:
    if len(values) <= n:
        return values
    return values[np.linspace(0, len(values) - 1, n).astype(np.int64)]
