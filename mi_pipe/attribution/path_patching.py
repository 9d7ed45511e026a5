"""Path patching: what a sender does to the metric through chosen receivers alone (Wang et al. 2022, appendix B).

Steps, for pairs with a base run (patched) and a donor run (gives the values):
1. run both and keep what every head reads (z) and what every MLP writes;
2. run the base prompt with every head's z held at its base value, except the sender's, which is the donor's. MLPs are
   recomputed, or held at their base values too (`mlps`); what the receivers compute in this run is kept: q, k or v of
   heads, an MLP's output before it is held, or the logits, whose metric is the result;
3. run the base prompt with the receivers at these values and everything else free.

Whether MLPs are recomputed changes the answer (then a path may go through them), so it is part of every result. Senders
are rows of one batch. Steps 2 and 3 run only what a sender can change (`path_passes`) where that gives the numbers
of whole forward passes, which is tried on a few rows first.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mi_pipe.attribution.atp import PairTokens
from mi_pipe.attribution.isolation import Isolation, PathRows
from mi_pipe.attribution.path_nodes import MLPs, Receiver, Sender, check_path
from mi_pipe.attribution.path_passes import PathPasses, RestartedPasses, WholePasses, largest_difference
from mi_pipe.attribution.path_runs import run_both
from mi_pipe.models.model import Model
from mi_pipe.patching.engine import CANNOT_RUN, TOLERANCE

_log = logging.getLogger(__name__)
_ROWS_TRIED = 2
_SENDERS_TRIED = 3


@dataclass(frozen=True)
class PathEffects:
    """The metric of every path-patched run, and of the two runs without patches."""

    patched: Float[Tensor, "pair sender"]
    base: Float[Tensor, " pair"]
    donor: Float[Tensor, " pair"]
    mlps: MLPs
    restarted: bool
    """Whether passes began at the sender's block; whole ones otherwise."""
    largest_error: float
    """Of restarted passes, of the rows that were tried, relative to the largest logit."""


class PathPatcher:
    """Path patching of the same pairs of one length; the two unpatched runs are made once."""

    def __init__(
        self, model: Model, pairs: PairTokens, metric: Any, mlps: MLPs = "recomputed", restarts: bool = True
    ) -> None:
        """Make the unpatched runs.

        `metric(logits, rows)` gives the metric of rows of last-position logits, `rows` saying of which pair each is.
        """
        self.model, self.pairs, self.metric, self.restarts = model, pairs, metric, restarts
        self.mlps: MLPs = mlps
        self.runs = run_both(model, pairs)
        everyone = torch.arange(len(pairs.base), device=pairs.base.device)
        self.base, self.donor = (metric(logits, everyone) for logits in (self.runs.base_logits, self.runs.donor_logits))

    @torch.no_grad()
    def patched(self, senders: Sequence[Sender], receivers: Sequence[Receiver], batch_rows: int = 64) -> PathEffects:
        """Return the metric when each sender alone is patched on its paths into all receivers together.

        Raises ConfigError if the logits receive beside others, or the model has no such sender or receiver.
        """
        check_path(senders, receivers, self.model.info)
        passes, error = self._passes(senders, receivers)
        device, n_pairs = self.pairs.base.device, len(self.pairs.base)
        values = torch.empty(len(senders), n_pairs, dtype=self.base.dtype, device=device)
        for layer in sorted({sender.layer for sender in senders}):
            here = [i for i, sender in enumerate(senders) if sender.layer == layer]
            of_layer = [senders[i] for i in here]
            number = torch.arange(len(here), device=device).repeat_interleave(n_pairs)
            pair = torch.arange(n_pairs, device=device).repeat(len(here))
            batches = zip(pair.split(batch_rows), number.split(batch_rows), strict=True)
            found = [self.metric(self._logits(passes, of_layer, receivers, *batch), batch[0]) for batch in batches]
            values[here] = torch.cat(found).view(len(here), n_pairs)
        return PathEffects(values.T, self.base, self.donor, self.mlps, isinstance(passes, RestartedPasses), error)

    def _logits(
        self,
        passes: PathPasses,
        senders: Sequence[Sender],
        receivers: Sequence[Receiver],
        pair: Int[Tensor, " row"],
        number: Int[Tensor, " row"],
    ) -> Float[Tensor, "row d_vocab"]:
        rows = PathRows(senders, pair, number, passes.first_pos)
        return passes.patched_logits(Isolation(self.model, self.runs, receivers, self.mlps, rows))

    def _passes(self, senders: Sequence[Sender], receivers: Sequence[Receiver]) -> tuple[PathPasses, float]:
        """Return restarted passes and how far they were off, or whole ones where they are off too far."""
        whole = WholePasses(self.model, self.pairs.base)
        if not self.restarts:
            return whole, 0.0
        name = self.model.info.architecture
        try:
            restarted = RestartedPasses(self.model, self.pairs.base, self.runs, receivers)
            error = self._error(restarted, whole, _spread(senders), receivers)
        except torch.OutOfMemoryError:
            raise
        except CANNOT_RUN as reason:
            _log.info("path patching of %s cannot restart: %s", name, reason)
            return whole, 0.0
        if error <= TOLERANCE[self.model.dtype]:
            return restarted, error
        _log.info("path patching of %s restarted is off by %.1e", name, error)
        return whole, 0.0

    def _error(
        self, restarted: PathPasses, whole: PathPasses, senders: Sequence[Sender], receivers: Sequence[Receiver]
    ) -> float:
        # A single pair is tried twice: what the blocks were called with for one row may fit one row alone.
        pair = torch.arange(_ROWS_TRIED, device=self.pairs.base.device) % len(self.pairs.base)
        number = torch.arange(len(senders), device=pair.device).repeat_interleave(_ROWS_TRIED)
        wanted = self._logits(whole, senders, receivers, pair.repeat(len(senders)), number)
        found = [self._logits(restarted, [sender], receivers, pair, pair * 0) for sender in senders]
        return largest_difference(torch.cat(found), wanted)


def _spread(senders: Sequence[Sender]) -> list[Sender]:
    """Return the first, the last and one between, by layer."""
    ordered = sorted(senders, key=lambda sender: sender.layer)
    steps = min(_SENDERS_TRIED, len(ordered))
    return [ordered[i * (len(ordered) - 1) // max(steps - 1, 1)] for i in range(steps)]
