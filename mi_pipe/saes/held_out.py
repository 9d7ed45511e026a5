"""Evaluation on the held-out side of a store: its rows, and its prompts with an SAE spliced into the model.

Which prompts are held out is decided by the store (by prompt, the same for all users); here only how many are used.
What is the same for all SAEs of a hook point (the prompts, the clean and the zero-ablated loss) is computed once.
"""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mi_pipe.activations.store import ActivationStore
from mi_pipe.models.model import Model
from mi_pipe.prompts.prompt_set import PromptSet
from mi_pipe.saes.config import TrainSAEsConfig
from mi_pipe.saes.evaluation import PromptBatch, SpliceFigures, cross_entropy, evaluate_rows, pad_prompts, zeros
from mi_pipe.saes.sae import SAE

_BATCH_ROWS = 2048
_BATCH_PROMPTS = 8


@dataclass(frozen=True)
class _Baseline:
    """What all SAEs of a hook point share."""

    batches: list[PromptBatch]
    ce_clean: float
    ce_zero: float


@dataclass(frozen=True)
class InModel:
    """What it takes to run SAEs within the model."""

    prompts: PromptSet
    load_model: Callable[[], Model]
    """Called once, when the model is first needed."""


class HeldOut:
    """The held-out rows and prompts of a store."""

    def __init__(self, store: ActivationStore, config: TrainSAEsConfig, in_model: InModel | None) -> None:
        """Evaluate on rows of `store`, and `in_model` where that is known."""
        self._store = store
        self._in_model = in_model
        self._asked = config.evaluation
        _, self._is_held_out = store.prompt_split(config.data.held_out_fraction, config.data.split_seed)
        self._model: Model | None = None
        self._baselines: dict[str, _Baseline] = {}

    def rows(self, hook: str, n_rows: int) -> Int[np.ndarray, " row"]:
        """Return up to `n_rows` held-out rows that are not massive, spread evenly, ascending."""
        return _spread(np.flatnonzero(self._is_held_out & ~self._store.massive(hook)), n_rows)

    def sample(self, hook: str, n_rows: int) -> Float[Tensor, "row d_in"]:
        """Return the activations of up to `n_rows` held-out rows."""
        return torch.from_numpy(self._store.take(hook, self.rows(hook, n_rows)))

    def evaluate(self, sae: SAE) -> dict[str, Any]:
        """Return metrics on held-out rows, and in the model (NaN if no prompts are asked for or known)."""
        figures = evaluate_rows(sae, self._batches(sae.hook))
        return {**dataclasses.asdict(figures), **self._splice(sae)}

    def prompt_batches(self, hook: str, prompts: PromptSet, bos_id: int | None) -> list[PromptBatch]:
        """Return held-out prompts, marked where the store has a row that is neither massive nor BOS."""
        usable = self._is_held_out & ~self._store.massive(hook)
        prompt_idx, pos = self._store.prompt_idx, self._store.pos
        chosen = _spread(np.unique(prompt_idx[self._is_held_out]), self._asked.n_prompts)
        tokens = [torch.from_numpy(prompts.prompt(int(i)).astype(np.int64)) for i in chosen]
        marks = [_mark(ids, pos[usable & (prompt_idx == i)], bos_id) for i, ids in zip(chosen, tokens, strict=True)]
        starts = range(0, len(tokens), _BATCH_PROMPTS)
        return [pad_prompts(tokens[i : i + _BATCH_PROMPTS], marks[i : i + _BATCH_PROMPTS]) for i in starts]

    def _batches(self, hook: str) -> Iterator[Float[Tensor, "batch d_in"]]:
        rows = self.rows(hook, self._asked.n_rows)
        for start in range(0, len(rows), _BATCH_ROWS):
            yield torch.from_numpy(self._store.take(hook, rows[start : start + _BATCH_ROWS]))

    def _splice(self, sae: SAE) -> dict[str, Any]:
        if self._asked.n_prompts == 0 or self._in_model is None:
            return {"n_prompts": 0, **dict.fromkeys(("ce_clean", "ce_sae", "ce_zero", "ce_recovered"), float("nan"))}
        if self._model is None:
            self._model = self._in_model.load_model()
        base = self._baseline(sae.hook, self._model, self._in_model.prompts)
        ce_sae = cross_entropy(self._model, sae.hook, base.batches, sae)
        figures = SpliceFigures(base.ce_clean, ce_sae, base.ce_zero)
        n_prompts = sum(batch.tokens.shape[0] for batch in base.batches)
        return {"n_prompts": n_prompts, **dataclasses.asdict(figures), "ce_recovered": figures.ce_recovered}

    def _baseline(self, hook: str, model: Model, prompts: PromptSet) -> _Baseline:
        if hook not in self._baselines:
            batches = self.prompt_batches(hook, prompts, model.vocabulary.bos_id)
            clean, zero = (cross_entropy(model, hook, batches, replacement) for replacement in (None, zeros))
            self._baselines[hook] = _Baseline(batches, clean, zero)
        return self._baselines[hook]


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
