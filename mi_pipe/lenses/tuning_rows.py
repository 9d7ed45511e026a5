"""The rows that a tuned lens is trained and measured on: whole prompts of an activation store, in three parts.

Held out is what `ActivationStore.held_out_prompts` holds out; validation prompts are the next of the same permutation.
Rows that are massive at one of the hook points are left out, as everywhere. A step's prompts follow from seed and step
alone, so that a training that was killed goes on as if it had not been.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mi_pipe.activations.store import ActivationStore
from mi_pipe.core.errors import ConfigError
from mi_pipe.lenses.config import TunedLensConfig
from mi_pipe.lenses.final_residuals import FinalResiduals

Part = Literal["training", "validation", "held_out"]
_ORDER_STREAM = 0x1E25
NO_TOKEN = -1


@dataclass(frozen=True)
class RowBatch:
    """Rows of some prompts."""

    rows: Int[np.ndarray, " row"]
    prompt_idx: Int[np.ndarray, " row"]
    next_id: Int[Tensor, " row"]
    """The token that follows in the prompt, -1 where the store does not say it."""
    residuals: dict[int, Float[Tensor, "row d_model"]]
    """By depth, float32."""
    last: Float[Tensor, "row d_model"]
    """The residual stream after the last block."""


class TuningRows:
    """Batches of a store's rows at the depths of a tuned lens."""

    def __init__(
        self, store: ActivationStore, hooks: dict[int, str], final: FinalResiduals, config: TunedLensConfig
    ) -> None:
        """Read the hook points `hooks` by depth; raises ConfigError if a part has no rows."""
        self._store, self._hooks, self._final, self._config = store, hooks, final, config
        usable = np.ones(store.n_rows, bool)
        for hook in hooks.values():
            usable &= ~store.massive(hook)
        self._usable = usable
        self._n_rows = np.bincount(store.prompt_idx[usable], minlength=store.n_prompts)
        self._parts = _parts(store, config)
        for part, is_in in self._parts.items():
            if not self._n_rows[is_in].sum():
                raise ConfigError(f"{store.id} has no rows of {part.replace('_', '-')} prompts that are not massive.")

    def training(self) -> Iterator[Int[np.ndarray, " prompt"]]:
        """Yield the prompts of each step."""
        step: list[int] = []
        n_rows = n_given = epoch = 0
        while True:
            for prompt in self._order(epoch):
                step.append(int(prompt))
                n_rows += int(self._n_rows[prompt])
                if n_rows >= self._config.batch_rows:
                    yield np.array(step)
                    step, n_rows, n_given = [], 0, n_given + 1
                    if n_given == self._config.n_steps:
                        return
            epoch += 1

    def sample(self, part: Part, n_rows: int) -> list[Int[np.ndarray, " prompt"]]:
        """Return prompts of a part with at most `n_rows` rows (at least one prompt), in batches like a step's."""
        prompts = np.flatnonzero(self._parts[part] & (self._n_rows > 0))
        total = np.cumsum(self._n_rows[prompts])
        chosen = prompts[: max(1, int((total <= n_rows).sum()))]
        batch_of = (np.cumsum(self._n_rows[chosen]) - 1) // self._config.batch_rows
        return [chosen[batch_of == i] for i in np.unique(batch_of)]

    def read(self, prompts: Int[np.ndarray, " prompt"], device: torch.device) -> RowBatch:
        """Return the usable rows of some prompts."""
        offset = self._store.prompt_offset
        rows = np.concatenate([np.arange(int(offset[i]), int(offset[i + 1])) for i in prompts])
        rows = rows[self._usable[rows]]
        residuals = {
            depth: torch.from_numpy(self._store.take(hook, rows)).to(device) for depth, hook in self._hooks.items()
        }
        last = self._final(rows).to(device)
        return RowBatch(rows, self._store.prompt_idx[rows], self._next_ids(rows).to(device), residuals, last)

    def _next_ids(self, rows: Int[np.ndarray, " row"]) -> Int[Tensor, " row"]:
        store = self._store
        after = np.minimum(rows + 1, store.n_rows - 1)
        follows = (store.prompt_idx[after] == store.prompt_idx[rows]) & (store.pos[after] == store.pos[rows] + 1)
        return torch.from_numpy(np.where(follows, store.token_id[after], NO_TOKEN).astype(np.int64))

    def _order(self, epoch: int) -> Int[np.ndarray, " prompt"]:
        seeds = np.random.SeedSequence([self._config.seed, _ORDER_STREAM, epoch])
        generator = np.random.Generator(np.random.Philox(seeds))
        return generator.permutation(np.flatnonzero(self._parts["training"] & (self._n_rows > 0)))


def _parts(store: ActivationStore, config: TunedLensConfig) -> dict[Part, Bool[np.ndarray, " prompt"]]:
    config.check()
    held_out = store.held_out_prompts(config.held_out_fraction, config.split_seed)
    # Shares of one permutation: the larger share has the smaller one in it.
    either = store.held_out_prompts(config.held_out_fraction + config.validation_fraction, config.split_seed)
    return {"training": ~either, "validation": either & ~held_out, "held_out": held_out}
