"""The last residual stream of a store's rows, of which the final logits are made: stored beside them, or run again."""

from typing import Protocol

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mi_pipe.activations.store import ActivationStore
from mi_pipe.lenses.residuals import run_residuals
from mi_pipe.models.model import Model
from mi_pipe.prompts.prompt_set import PromptSet

_PROMPTS_AT_ONCE = 8


class FinalResiduals(Protocol):
    """Gives the residual stream after the last block."""

    def __call__(self, rows: Int[np.ndarray, " row"]) -> Float[Tensor, "row d_model"]:
        """Return that of rows of the store, ascending, in float32."""
        ...


class StoredFinal:
    """Where the store has the last depth: a read, and no forward pass."""

    def __init__(self, store: ActivationStore, hook: str) -> None:
        """Read the hook point of the last depth."""
        self._store, self._hook = store, hook

    def __call__(self, rows: Int[np.ndarray, " row"]) -> Float[Tensor, "row d_model"]:
        """Return stored rows."""
        return torch.from_numpy(self._store.take(self._hook, rows))


class LiveFinal:
    """Where it has not: the model is run on the rows' prompts."""

    def __init__(self, store: ActivationStore, model: Model, prompts: PromptSet) -> None:
        """Run `model` on prompts of the set that the store was harvested on."""
        self._store, self._model, self._prompts = store, model, prompts

    def __call__(self, rows: Int[np.ndarray, " row"]) -> Float[Tensor, "row d_model"]:
        """Return the values of a run without padding to the left, which changes nothing in a causal model."""
        prompt_of, pos = self._store.prompt_idx[rows], self._store.pos[rows]
        out = torch.empty(len(rows), self._model.info.d_model)
        chosen = np.unique(prompt_of)
        for start in range(0, len(chosen), _PROMPTS_AT_ONCE):
            some = chosen[start : start + _PROMPTS_AT_ONCE]
            ids = [torch.from_numpy(self._prompts.prompt(int(i)).astype(np.int64)) for i in some]
            tokens = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
            depth = self._model.info.n_layers
            last = run_residuals(self._model, tokens, [depth])[0][depth].float().cpu()
            here = np.flatnonzero(np.isin(prompt_of, some))
            out[here] = last[np.searchsorted(some, prompt_of[here]), pos[here]]
        return out
