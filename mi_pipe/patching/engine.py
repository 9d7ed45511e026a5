"""Many patches in few forward passes, exactly.

A patch replaces, in the base run of one pair, part of the value at one hook point by the donor run's. Nothing
before the patched layer changes, nothing at earlier positions changes, and the metric reads two logits of one
position. So the restart engine
1. starts at the patched block, from the stored hidden states of the base run;
2. runs only the positions from the patch's first on, with the base run's keys and values of those before;
3. unembeds only the answer's tokens at the last position;
and puts many patches into one batch. The plain engine runs the whole model under hooks instead, one row a
patch, and gives the same numbers for any architecture.

`make_engine` takes the shortcuts that reproduce the model's own logits on the pairs at hand, and says by how
much the worst of them was off.
"""

import logging
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mi_pipe.models.hook_points import layer_of
from mi_pipe.models.model import Edit, Model
from mi_pipe.patching.block_calls import BlockCalls, Prefix
from mi_pipe.patching.readout import choice_diff, last_logits, token_logits
from mi_pipe.patching.runs import PairRuns

_log = logging.getLogger(__name__)
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


@dataclass(frozen=True)
class Patches:
    """Patches at one hook point, one a row."""

    hook: str
    pair: Int[Tensor, " row"]
    """Which pair's base run is patched, and whose donor values are used."""
    mask: Bool[Tensor, "row mask_pos mask_width"]
    """What is replaced; an axis of size 1 stands for all positions or the whole width."""
    first_pos: int = 0
    """No row replaces anything before this position."""

    def edit(self, runs: PairRuns, first_pos: int = 0) -> Edit:
        """Return the hook function, for values that begin at `first_pos`."""
        donor = runs.donors[self.hook][self.pair, first_pos:]
        mask = self.mask if self.mask.shape[1] == 1 else self.mask[:, first_pos:]
        return lambda value: torch.where(mask, donor.to(value.dtype), value)


class PatchEngine(Protocol):
    """Gives the metric of patched runs."""

    runs: PairRuns

    def patched_metric(self, patches: Patches) -> Float[Tensor, " row"]:
        """Return the logit difference of each patched run, float32."""
        ...


class PlainEngine:
    """One whole forward pass of the model under hooks; knows nothing of its architecture."""

    def __init__(self, model: Model, runs: PairRuns) -> None:
        """Patch the base runs of `runs`."""
        self.model = model
        self.runs = runs

    @torch.no_grad()
    def patched_metric(self, patches: Patches) -> Float[Tensor, " row"]:
        """Return the logit difference of each patched run, float32."""
        with self.model.edited({patches.hook: patches.edit(self.runs)}):
            logits = last_logits(self.model, self.runs.tokens[patches.pair])
        return choice_diff(logits.gather(-1, self.runs.choices[patches.pair]))


class RestartEngine:
    """Runs only the blocks, positions and logits that a patch can change."""

    def __init__(self, model: Model, runs: PairRuns, reuse_prefix: bool = True) -> None:
        """Patch the base runs of `runs`; `reuse_prefix` allows to leave unchanged positions out."""
        self.model = model
        self.runs = runs
        self.calls = BlockCalls(model, runs.tokens)
        self.reuses_prefix = reuse_prefix and runs.keys_values is not None and self.calls.takes_prefix

    @torch.no_grad()
    def patched_metric(self, patches: Patches) -> Float[Tensor, " row"]:
        """Return the logit difference of each patched run, float32."""
        layer = layer_of(patches.hook)
        assert layer is not None, "patches are inside blocks"
        first_pos = patches.first_pos if self.reuses_prefix else 0
        with self.model.edited({patches.hook: patches.edit(self.runs, first_pos)}):
            return choice_diff(self.restarted_logits(patches.pair, layer, first_pos))

    def restarted_logits(self, pair: Int[Tensor, " row"], layer: int, first_pos: int) -> Float[Tensor, "row 2"]:
        """Run the base run of `pair` from a block and a position on; logits of the answer and the wrong token."""
        hidden = self.runs.residuals[layer][pair, first_pos:]
        hidden = self.calls.run(hidden, layer, prefix=self._prefix(pair, first_pos))
        return token_logits(self.model, hidden, self.runs.choices[pair])

    @torch.no_grad()
    def largest_error(self) -> float:
        """Return the largest deviation from the model's own logits, as a fraction of their largest value.

        Restarts at the first, the middle and the last block, from the first and (with a prefix) the middle position.
        """
        n_layers, n_pos = len(self.calls), self.runs.n_pos
        pairs = torch.arange(self.runs.n_pairs, device=self.runs.tokens.device)
        starts = {0, n_pos // 2} if self.reuses_prefix else {0}
        found = [
            self.restarted_logits(pairs, layer, first_pos)
            for layer in sorted({0, n_layers // 2, n_layers - 1})
            for first_pos in sorted(starts)
        ]
        wanted = self.runs.base_logits
        error = (torch.stack(found) - wanted).abs().max() / wanted.abs().max().clamp_min(1e-9)
        return float(error.nan_to_num(nan=torch.inf))

    def _prefix(self, pair: Int[Tensor, " row"], first_pos: int) -> Prefix | None:
        if not first_pos:
            return None
        assert self.runs.keys_values is not None
        return self.runs.keys_values.prefix(pair, first_pos)


def make_engine(model: Model, runs: PairRuns) -> tuple[PatchEngine, float]:
    """Return the fastest engine that agrees with the model, and its largest relative error (0 for plain hooks)."""
    tolerance = _TOLERANCE[model.dtype]
    for reuse_prefix in (True, False):
        try:
            engine = RestartEngine(model, runs, reuse_prefix)
            error = engine.largest_error()
        except torch.OutOfMemoryError:
            raise
        except (TypeError, ValueError, KeyError, IndexError, AttributeError, RuntimeError) as reason:
            _log.info("blocks of %s cannot be called alone: %s", model.info.architecture, reason)
            continue
        if error <= tolerance:
            return engine, error
        _log.info("restarting %s is off by %.1e, reuse of the prefix %s", model.info.architecture, error, reuse_prefix)
    return PlainEngine(model, runs), 0.0
