"""How the forward passes of path patching are run: as whole passes under hooks, or restarted where a sender writes.

Restarted passes leave out what cannot change, and are exact:
- the isolated run begins at the sender's block, from the base run's residual stream, and ends at the last receiver's;
- there every head's z is known, so attention is not run: its output is the base run's, in the sender's own block the
  projection of z with what is sent. Only where q, k or v are received is it run, to have them;
- then positions do not see each other: into the logits the last position is run alone, into others those from the
  first on at which the prompts differ (with the base run's keys and values of those before);
- an MLP that is frozen and does not receive is not run;
- the run with the receivers begins at the first receiver's block.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mi_pipe.attribution.attention_calls import listening_to_attention, only_watch
from mi_pipe.attribution.isolation import Isolation
from mi_pipe.attribution.nodes import Site
from mi_pipe.attribution.path_nodes import Receiver
from mi_pipe.attribution.path_runs import ATTENTION, MLP, PathRuns
from mi_pipe.models.model import Model
from mi_pipe.patching.block_calls import BlockCalls, Prefix
from mi_pipe.patching.readout import all_logits, last_logits


class PathPasses(Protocol):
    """Runs the forward passes of one batch of rows; the senders of a batch lie in one layer."""

    first_pos: int
    """No position before it is run."""

    def patched_logits(self, isolation: Isolation) -> Float[Tensor, "row d_vocab"]:
        """Return the last position's logits of each row with its sender's paths into the receivers patched."""
        ...


class WholePasses:
    """Two passes of the whole model for each row, one if the logits receive; any architecture."""

    first_pos = 0

    def __init__(self, model: Model, tokens: Tensor) -> None:
        """Run these base prompts, one a pair."""
        self.model, self.tokens = model, tokens

    def patched_logits(self, isolation: Isolation) -> Float[Tensor, "row d_vocab"]:
        """Return the last position's logits of each row with its sender's paths into the receivers patched."""
        tokens = self.tokens[isolation.rows.pair]
        with isolation.running():
            logits = last_logits(self.model, tokens, use_cache=False)
        if isolation.receivers[0].kind == "logits":
            return logits
        with isolation.receiving():
            return last_logits(self.model, tokens, use_cache=False)


class RestartedPasses:
    """Runs only the blocks, positions and modules that a sender can change."""

    def __init__(self, model: Model, tokens: Tensor, runs: PathRuns, receivers: Sequence[Receiver]) -> None:
        """Look at how the model calls its blocks, attention as the receivers need it."""
        self.model, self.runs = model, runs
        self.looked_into = {receiver.layer for receiver in receivers if receiver.kind in "qkv"}
        """Layers whose q, k or v are received."""
        with ExitStack() as stack:
            if self.looked_into:
                stack.enter_context(listening_to_attention(model, only_watch))
            self.calls = BlockCalls(model, tokens)
        self.into_logits = receivers[0].kind == "logits"
        self.first, self.last = (0, len(self.calls) - 1) if self.into_logits else _ends(receivers)
        can_reuse = runs.keys_values is not None and self.calls.takes_prefix
        self.first_pos = self.calls.n_pos - 1 if self.into_logits else runs.first_change if can_reuse else 0

    def patched_logits(self, isolation: Isolation) -> Float[Tensor, "row d_vocab"]:
        """Return the last position's logits of each row with its sender's paths into the receivers patched."""
        pair = isolation.rows.pair
        start = isolation.rows.senders[0].layer
        if start > self.last:
            return self.runs.base_logits[pair]
        prefix = self._prefix(isolation)
        with isolation.running():
            hidden = self._entering(start, isolation)
            for layer in range(start, self.last + 1):
                known = self._known(layer, isolation)
                hidden = self.calls.call(layer, hidden, prefix if layer in self.looked_into else None, known)
        if not self.into_logits:
            with isolation.receiving():
                hidden = self.calls.run(self._entering(self.first, isolation), self.first, prefix=prefix)
        return all_logits(self.model, hidden)

    def _entering(self, layer: int, isolation: Isolation) -> Float[Tensor, "row pos d_model"]:
        return self.runs.of_base(Site("resid_pre", layer).hook, isolation.rows.pair, self.first_pos)

    def _prefix(self, isolation: Isolation) -> Prefix | None:
        keys_values = self.runs.keys_values
        if self.into_logits or not self.first_pos or keys_values is None:
            return None
        return keys_values.prefix(isolation.rows.pair, self.first_pos)

    def _known(self, layer: int, isolation: Isolation) -> dict[nn.Module, Tensor]:
        """Return what modules of a block return in the isolated run, where that is known without running them."""
        parts, pair = self.calls.parts[layer], isolation.rows.pair

        def base(name: str) -> Tensor:
            return self.runs.of_base(f"blocks.{layer}.{name}", pair, self.first_pos)

        known: dict[nn.Module, Tensor] = {}
        if layer not in self.looked_into:
            assert parts.attention is not None, "its output is what is known"
            assert parts.projection is not None, "z was recorded at its input"
            # The isolation's hook on the projection's input puts in what is sent.
            is_changed = isolation.sends(Site("z", layer))
            known[parts.attention] = parts.projection(base("attn.hook_z")) if is_changed else base(ATTENTION)
        receives = Receiver("mlp", layer) in isolation.receivers
        if isolation.mlps == "frozen" and not receives and parts.mlp is not None:
            known[parts.mlp] = base(MLP)
        return known


def _ends(receivers: Sequence[Receiver]) -> tuple[int, int]:
    layers = [receiver.layer for receiver in receivers]
    return min(layers), max(layers)


def largest_difference(one: Float[Tensor, "row d_vocab"], other: Float[Tensor, "row d_vocab"]) -> float:
    """Return the largest difference as a fraction of the largest logit; infinite where either is not finite."""
    error = (one - other).abs().max() / other.abs().max().clamp_min(1e-9)
    return float(error.nan_to_num(nan=torch.inf))
