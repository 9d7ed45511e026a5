"""Many patches in few forward passes, exactly.

A patch replaces, in the base run of one pair, part of the value at one hook point by another value. Nothing before
the patched layer changes, nothing at earlier positions changes, and the metric reads one position. Each of these
shortcuts is exact and can be left out:
restart: begin at the patched block, from the stored hidden states of the base run;
kept_parts: in the patched block, do not run again the attention (or MLP) whose output is known: the base run's, plus
what the patch writes through the output projection; where one position alone is patched, run that one alone;
prefix: run only the positions from the patch's first on, with the base run's keys and values of those before;
last_position: run the last block for the answer position alone;
answer_logits: unembed only the tokens that the metric reads.

The plain engine takes none: it runs the whole model under hooks, one row a patch, and gives the same numbers for any
architecture. `make_engine` takes the shortcuts that reproduce the model's own logits on the pairs at hand, and says by
how much the worst of them was off.
"""

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Literal, Protocol, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mi_pipe.models.hook_points import layer_of
from mi_pipe.models.lean import lean
from mi_pipe.models.model import Model
from mi_pipe.patching.between import edits_between, is_between, not_between
from mi_pipe.patching.block_calls import BlockCalls, Prefix
from mi_pipe.patching.edits import edited
from mi_pipe.patching.kept_parts import KeptParts, checked_pairs
from mi_pipe.patching.patches import Patches, edited_hook
from mi_pipe.patching.readout import all_logits, last_logits, read_logits, token_logits
from mi_pipe.patching.runs import PairRuns

_log = logging.getLogger(__name__)
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest deviation from the model's own logits that is rounding, relative to the largest."""
CANNOT_RUN = (TypeError, ValueError, KeyError, IndexError, AttributeError, RuntimeError, AssertionError)
"""What blocks raise that cannot be called one by one."""

Shortcut = Literal["restart", "kept_parts", "prefix", "last_position", "answer_logits"]
SHORTCUTS: tuple[Shortcut, ...] = get_args(Shortcut)


class PatchEngine(Protocol):
    """Gives the metric of patched runs."""

    model: Model
    runs: PairRuns

    def patched_metric(self, patches: Patches) -> Float[Tensor, " row"]:
        """Return the metric of each patched run, float32."""
        ...


class PlainEngine:
    """One whole forward pass of the model under hooks; knows nothing of its architecture."""

    def __init__(self, model: Model, runs: PairRuns) -> None:
        """Patch the base runs of `runs`."""
        self.model = model
        self.runs = runs

    @torch.no_grad()
    def patched_metric(self, patches: Patches) -> Float[Tensor, " row"]:
        """Return the metric of each patched run, float32."""
        return self.runs.metric.values(self._logits(patches), self.runs.info.rows(patches.pair))

    @torch.no_grad()
    def check(self) -> None:
        """Raise StageError if the sweep patches between attention and MLP, and the model's blocks are not made so."""
        runs = self.runs
        if hook := next(filter(is_between, map(edited_hook, runs.donors)), None):
            itself = PlainEngine(self.model, replace(runs, donors={hook: runs.base[hook]}))
            found = itself._logits(Patches(hook, torch.arange(runs.n_pairs, device=runs.tokens.device)))
            error = (found - runs.base_logits).abs().max() / runs.base_logits.abs().max()
            if not error <= TOLERANCE[self.model.dtype]:
                raise not_between(self.model.info.architecture, float(error))

    def _logits(self, patches: Patches) -> Float[Tensor, "row n"]:
        runs, hook = self.runs, patches.edited_hook
        edits = edits_between(patches, runs) if is_between(hook) else {hook: patches.edit(runs)}
        with ExitStack() as stack:
            for name, edit in edits.items():
                stack.enter_context(edited(self.model, name, edit))
            logits = last_logits(self.model, runs.tokens[patches.pair])
        return read_logits(logits, runs.info.rows(patches.pair), runs.metric.needs_all_logits)


class RestartEngine:
    """Runs only the blocks, positions and logits that a patch can change."""

    def __init__(self, model: Model, runs: PairRuns, shortcuts: Sequence[Shortcut] = SHORTCUTS) -> None:
        """Patch the base runs of `runs` with these shortcuts, as far as the model's blocks offer them."""
        self.model = model
        self.runs = runs
        self.calls = BlockCalls(model, runs.tokens)
        can_reuse = runs.keys_values is not None and self.calls.takes_prefix
        offered = {"prefix": can_reuse, "last_position": self.calls.can_narrow}
        self.shortcuts = frozenset(name for name in shortcuts if offered.get(name, True))
        self.kept = KeptParts(self.calls, runs)

    @torch.no_grad()
    def patched_metric(self, patches: Patches) -> Float[Tensor, " row"]:
        """Return the metric of each patched run, float32."""
        layer = layer_of(patches.hook)
        assert layer is not None, "patches are inside blocks"
        first_pos = patches.first_pos if "prefix" in self.shortcuts else 0
        with lean(self.model.module):
            last = self._last_hidden(patches, layer, first_pos)
            return self._metric(last, patches.pair)

    def restarted_logits(self, pair: Int[Tensor, " row"], layer: int, first_pos: int) -> Float[Tensor, "row n"]:
        """Run the base run of `pair` from a block and a position on; logits as the metric is given them."""
        hidden = self.runs.residuals[layer][pair, first_pos:]
        return self._logits(self._run(hidden, layer, self._prefix(pair, first_pos)), pair)

    @torch.no_grad()
    def largest_error(self) -> float:
        """Return the largest deviation from the model's own values, as a fraction of their largest.

        Restarts at the first, the middle and the last block, from the first and (with a prefix) the middle position,
        and, for what the sweep patches, runs blocks and projections on the base run's own parts; of a few pairs.
        """
        n_layers, n_pos = len(self.calls), self.runs.n_pos
        pairs = checked_pairs(self.runs)
        starts = {0, n_pos // 2} if "prefix" in self.shortcuts else {0}
        with lean(self.model.module):
            found = [
                self.restarted_logits(pairs, layer, first_pos)
                for layer in sorted({0, n_layers // 2, n_layers - 1})
                for first_pos in sorted(starts)
            ]
            kept_error = self.kept.largest_error(only_between="kept_parts" not in self.shortcuts)
        wanted = self.runs.base_logits[pairs]
        error = (torch.stack(found) - wanted).abs().max() / wanted.abs().max().clamp_min(1e-9)
        return max(float(error.nan_to_num(nan=torch.inf)), kept_error)

    def _last_hidden(self, patches: Patches, layer: int, first_pos: int) -> Float[Tensor, "row pos d_model"]:
        """Return what leaves the last block at the last position (and perhaps others) of each patched run."""
        runs, pair, hook = self.runs, patches.pair, patches.edited_hook
        prefix = self._prefix(pair, first_pos)
        if hook.endswith((".hook_resid_pre", ".hook_resid_post")):
            enters = layer + hook.endswith("post")
            hidden = patches.edit(runs, first_pos)(runs.residuals[enters][pair, first_pos:])
            return self._run(hidden, enters, prefix)
        if self.kept.knows(hook) and ("kept_parts" in self.shortcuts or is_between(hook)):
            return self._run(self.kept.after(patches, layer, first_pos), layer + 1, prefix)
        hidden = runs.residuals[layer][pair, first_pos:]
        with edited(self.model, hook, patches.edit(runs, first_pos)):
            # Whole: what is edited has all positions.
            hidden = self.calls.call(layer, hidden, prefix)
        return self._run(hidden, layer + 1, prefix)

    def _run(self, hidden: Tensor, start: int, prefix: Prefix | None) -> Tensor:
        """Run the blocks from `start` on, the last for the last position alone where that is allowed."""
        last = len(self.calls) - 1
        if start > last or "last_position" not in self.shortcuts:
            return self.calls.run(hidden, start, prefix=prefix)
        return self.calls.call_at_last(last, self.calls.run(hidden, start, last, prefix), prefix)

    def _logits(self, hidden: Float[Tensor, "row pos d_model"], pair: Int[Tensor, " row"]) -> Float[Tensor, "row n"]:
        info, needs_all = self.runs.info.rows(pair), self.runs.metric.needs_all_logits
        if "answer_logits" in self.shortcuts and not needs_all:
            return token_logits(self.model, hidden, info.choices)
        return read_logits(all_logits(self.model, hidden), info, needs_all)

    def _metric(self, hidden: Float[Tensor, "row pos d_model"], pair: Int[Tensor, " row"]) -> Float[Tensor, " row"]:
        return self.runs.metric.values(self._logits(hidden, pair), self.runs.info.rows(pair))

    def _prefix(self, pair: Int[Tensor, " row"], first_pos: int) -> Prefix | None:
        if not first_pos:
            return None
        assert self.runs.keys_values is not None
        return self.runs.keys_values.prefix(pair, first_pos)


def make_engine(
    model: Model, runs: PairRuns, shortcuts: Sequence[Shortcut] = SHORTCUTS
) -> tuple[RestartEngine | PlainEngine, float]:
    """Return the fastest engine that agrees with the model, and its largest relative error (0 for plain hooks).

    All `shortcuts` are tried together, then without the last of them, and so on. Raises StageError for resid_mid of
    models that have none.
    """
    allowed: list[Shortcut] = [name for name in SHORTCUTS if name in shortcuts]
    tolerance = TOLERANCE[model.dtype]
    for chosen in _fallbacks(allowed) if "restart" in allowed else ():
        try:
            engine = RestartEngine(model, runs, chosen)
            error = engine.largest_error()
        except torch.OutOfMemoryError:
            raise
        except CANNOT_RUN as reason:
            _log.info("%s with %s cannot be run: %s", model.info.architecture, ", ".join(chosen), reason)
            continue
        if error <= tolerance:
            return engine, error
        _log.info("%s with %s is off by %.1e", model.info.architecture, ", ".join(chosen), error)
    plain = PlainEngine(model, runs)
    plain.check()
    return plain, 0.0


def _fallbacks(allowed: list[Shortcut]) -> list[list[Shortcut]]:
    """Return all shortcuts, all but one, and the restart alone."""
    fewer: list[list[Shortcut]] = [[name for name in allowed if name != left_out] for left_out in reversed(allowed[1:])]
    return [allowed, *fewer, ["restart"]]
