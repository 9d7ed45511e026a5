"""One sweep, by mi_pipe's engine and by TransformerLens' own function; each turn includes the runs it needs before.

Both turns begin with the two tokenised prompts of every pair and end with one metric a cell and pair: the clean run
that TransformerLens caches, and the runs, checks and captured block arguments of the engine, are counted.
"""

from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass, field
from io import StringIO

import numpy as np
import torch
from transformer_lens import patching as tl

from mi_pipe.models.model import Model
from mi_pipe.patching.engine import SHORTCUTS, Shortcut, make_engine
from mi_pipe.patching.metrics import logit_diff
from mi_pipe.patching.runs import run_pairs
from mi_pipe.patching.sweep import batch_tokens, sweep_layer
from mi_pipe.patching.units import Unit, hook_of
from mi_pipe.prompts.prompt_set import PairGroup


@dataclass
class Sweep:
    """The sweep of a unit over all layers."""

    model: Model
    group: PairGroup
    unit: Unit
    shortcuts: Sequence[Shortcut] = SHORTCUTS
    values: np.ndarray = field(init=False)
    """Metric (pair, layer, *axes) of the last turn."""

    def turn(self) -> None:
        """Run both prompts, make the engine, sweep."""
        info = self.model.info
        hooks = [hook_of(self.unit, layer) for layer in range(info.n_layers)]
        runs = run_pairs(self.model, self.group, "denoising", hooks)
        engine, _ = make_engine(self.model, runs, self.shortcuts)
        tokens = batch_tokens(info)
        layers = [sweep_layer(engine, self.unit, layer, tokens) for layer in range(info.n_layers)]
        self.values = np.stack(layers, axis=1)

    @property
    def scale(self) -> float:
        """The largest absolute metric of all patched runs."""
        return float(np.abs(self.values).max())


@dataclass
class TransformerLensSweep:
    """The same by `transformer_lens.patching`; of a long sweep, some layers alone."""

    model: Model
    group: PairGroup
    unit: Unit
    layers: Sequence[int]
    values: np.ndarray = field(init=False)
    """Metric (pair, layer, *axes) of the last turn, NaN in the layers that were left out."""

    def turn(self) -> None:
        """Cache the clean run, then patch cell by cell."""
        bridge, group = self.model.bridge, self.group
        with torch.no_grad(), redirect_stderr(StringIO()):  # its progress bars
            _, cache = bridge.run_with_cache(group.clean)
            found = self._patch(bridge, cache, lambda logits: logit_diff(logits[:, -1], group.answer, group.wrong))
        self.values = found.cpu().numpy()

    def _patch(self, bridge: object, cache: object, metric: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        info, n_pairs, n_pos = self.model.info, self.group.n_pairs, self.group.n_pos
        by_pos = self.unit.endswith("_by_pos")
        axes = ["layer", "pos", "head_index"] if by_pos else ["layer", "head_index"]
        sizes = [info.n_layers, n_pos, info.n_heads] if by_pos else [info.n_layers, info.n_heads]
        index = tl.make_df_from_ranges(sizes, axes)
        index = index[index["layer"].isin(self.layers)].reset_index(drop=True)
        setter = tl.layer_pos_head_vector_patch_setter if by_pos else tl.layer_head_vector_patch_setter
        result = tl.generic_activation_patch(
            bridge, self.group.corrupted, cache, metric, setter, "z", index_df=index, reduce="none"
        )
        values = getattr(result, "values", result)
        out = torch.full((*sizes, n_pairs), torch.nan)
        out[tuple(torch.tensor(index[axis].to_numpy()) for axis in axes)] = values.reshape(-1, n_pairs)
        return out.permute(3, 0, 2, 1) if by_pos else out.permute(2, 0, 1)
