"""Evaluation on the held-out side of a store: its rows, and its prompts with an SAE spliced into the model.

Which prompts are held out is decided by the store (by prompt, the same for all users); here only how many are used.
What is the same for all SAEs of a hook point (the prompts, the loss with zero in its place) is computed once.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mi_pipe.activations.training.source import RowSource
from mi_pipe.models.model import Model
from mi_pipe.prompts.prompt_set import PromptSet
from mi_pipe.saes.config import TrainSAEsConfig
from mi_pipe.saes.evaluation import RowEvaluation, evaluate_rows
from mi_pipe.saes.sae import SAE
from mi_pipe.saes.sites import Sites
from mi_pipe.saes.splice import PromptBatch, cross_entropy, pad_prompts, splice_figures, zeros
from mi_pipe.saes.step import Batch

_BATCH_ROWS = 2048
_BATCH_PROMPTS = 8
IN_MODEL_COLUMNS = ("ce_clean", "ce_sae", "ce_zero", "ce_recovered", "kl", "n_prompts")


@dataclass(frozen=True)
class InModel:
    """What it takes to run SAEs within the model."""

    prompts: PromptSet
    load_model: Callable[[], Model]
    """Called once, when the model is first needed."""


class HeldOut:
    """The held-out rows and prompts of a store."""

    def __init__(self, store: RowSource, config: TrainSAEsConfig, in_model: InModel | None) -> None:
        """Evaluate on rows of `store`, and `in_model` where that is known."""
        self._store = store
        self._in_model = in_model
        _, self._is_held_out = store.prompt_split(config.data.held_out_fraction, config.data.split_seed)
        self._model: Model | None = None
        self._batches: dict[tuple[Sites, int], list[PromptBatch]] = {}
        self._ce_zero: dict[tuple[Sites, int], float] = {}

    def rows(self, sites: Sites, n_rows: int) -> Int[np.ndarray, " row"]:
        """Return up to `n_rows` held-out rows that are massive nowhere, spread evenly, ascending."""
        return _spread(np.flatnonzero(self._usable(sites)), n_rows)

    def sample(self, sites: Sites, n_rows: int) -> Batch:
        """Return the raw activations of up to `n_rows` held-out rows."""
        return self._batch(sites, self.rows(sites, n_rows))

    def evaluate_rows(self, sae: SAE, n_rows: int) -> RowEvaluation:
        """Return metrics on up to `n_rows` held-out rows."""
        return evaluate_rows(sae, self._row_batches(sae.sites, n_rows))

    def evaluate_in_model(self, sae: SAE, n_prompts: int) -> dict[str, Any]:
        """Return metrics in the model on up to `n_prompts` prompts; NaN if there are none, or no model that has the
        hooks.

        Where the SAE reads a second store, there is no one model to run it in.
        """
        nothing = {**dict.fromkeys(IN_MODEL_COLUMNS, math.nan), "n_prompts": 0}
        if n_prompts == 0 or self._in_model is None:
            return nothing
        if self._model is None:
            self._model = self._in_model.load_model()
        if any(hook not in self._model.hooks for hook in sae.sites.hooks):
            return nothing
        batches = self._prompt_batches(sae.sites, n_prompts, self._model)
        figures = splice_figures(self._model, sae, batches, self._zero_loss(sae.sites, n_prompts, self._model))
        made = {**dataclasses.asdict(figures), "ce_recovered": figures.ce_recovered}
        return {**made, "n_prompts": sum(len(batch.tokens) for batch in batches)}

    def _usable(self, sites: Sites) -> Bool[np.ndarray, " row"]:
        usable = self._is_held_out.copy()
        for hook in sites.hooks:
            usable &= ~self._store.massive(hook)
        return usable

    def _row_batches(self, sites: Sites, n_rows: int) -> Iterator[Batch]:
        rows = self.rows(sites, n_rows)
        for start in range(0, len(rows), _BATCH_ROWS):
            yield self._batch(sites, rows[start : start + _BATCH_ROWS])

    def _batch(self, sites: Sites, rows: Int[np.ndarray, " row"]) -> Batch:
        taken = {hook: torch.from_numpy(self._store.take(hook, rows)) for hook in sites.hooks}
        return side_by_side(taken, sites)

    def _zero_loss(self, sites: Sites, n_prompts: int, model: Model) -> float:
        if (sites, n_prompts) not in self._ce_zero:
            batches = self._prompt_batches(sites, n_prompts, model)
            losses = [cross_entropy(model, hook, batches, zeros) for hook in sites.outputs]
            self._ce_zero[sites, n_prompts] = sum(losses) / len(losses)
        return self._ce_zero[sites, n_prompts]

    def _prompt_batches(self, sites: Sites, n_prompts: int, model: Model) -> list[PromptBatch]:
        """Return held-out prompts, marked where the store has a row that is neither massive nor BOS."""
        assert self._in_model is not None, "asked for only with a model"
        if (sites, n_prompts) not in self._batches:
            prompts, bos_id = self._in_model.prompts, model.vocabulary.bos_id
            usable, prompt_idx, pos = self._usable(sites), self._store.prompt_idx, self._store.pos
            chosen = _spread(np.unique(prompt_idx[self._is_held_out]), n_prompts)
            tokens = [torch.from_numpy(prompts.prompt(int(i)).astype(np.int64)) for i in chosen]
            marks = [_mark(ids, pos[usable & (prompt_idx == i)], bos_id) for i, ids in zip(chosen, tokens, strict=True)]
            starts = range(0, len(tokens), _BATCH_PROMPTS)
            self._batches[sites, n_prompts] = [
                pad_prompts(tokens[i : i + _BATCH_PROMPTS], marks[i : i + _BATCH_PROMPTS]) for i in starts
            ]
        return self._batches[sites, n_prompts]


def side_by_side(taken: dict[str, Float[Tensor, "batch width"]], sites: Sites) -> Batch:
    """Return what an SAE reads and writes, given the activations of its hook points."""
    x = _joined(taken, sites.inputs)
    return Batch(x, x if sites.inputs == sites.outputs else _joined(taken, sites.outputs))


def _joined(taken: dict[str, Float[Tensor, "batch width"]], hooks: tuple[str, ...]) -> Float[Tensor, "batch d"]:
    parts = [taken[hook] for hook in hooks]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


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
