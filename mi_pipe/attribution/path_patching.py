"""Path patching: what a sender does to the metric through chosen receivers alone (Wang et al. 2022, appendix B).

Steps, for pairs with a base run (patched) and a donor run (gives the values):
1. run both and keep what every head reads (z) and what every MLP writes;
2. run the base prompt with every head's z held at its base value, except the sender's, which is the donor's. MLPs are
   recomputed, or held at their base values too (`mlps`); what the receivers compute in this run is kept: q, k or v of
   heads, an MLP's output before it is held, or the logits, whose metric is the result;
3. run the base prompt with the receivers at these values and everything else free.

Whether MLPs are recomputed changes the answer (then a path may go through them), so it is part of every result. Senders
are rows of one batch. Step 2 and 3 are whole forward passes: two for each sender (one if the logits receive).
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mi_pipe.attribution.atp import PairTokens
from mi_pipe.attribution.attention_calls import AttentionCall, listening_to_attention
from mi_pipe.attribution.nodes import Site, sites_of
from mi_pipe.attribution.path_nodes import MLPs, Receiver, Sender, check_path
from mi_pipe.attribution.recording import NodeRun, run_nodes
from mi_pipe.models.model import Edit, Model
from mi_pipe.patching.readout import last_logits


@dataclass(frozen=True)
class PathEffects:
    """The metric of every path-patched run, and of the two runs without patches."""

    patched: Float[Tensor, "pair sender"]
    base: Float[Tensor, " pair"]
    donor: Float[Tensor, " pair"]
    mlps: MLPs


class PathPatcher:
    """Path patching of the same pairs of one length; the two unpatched runs are made once."""

    def __init__(self, model: Model, pairs: PairTokens, metric: Any, mlps: MLPs = "recomputed") -> None:
        """Make the unpatched runs.

        `metric(logits, rows)` gives the metric of rows of last-position logits, `rows` saying of which pair each is.
        """
        self.model, self.pairs, self.metric = model, pairs, metric
        self.mlps: MLPs = mlps
        sites = [Site("embed"), *sites_of(["z"], model.info)]
        sites += [] if model.info.attn_only else sites_of(["mlp_out"], model.info)
        everyone = torch.arange(len(pairs.base), device=pairs.base.device)
        self.base, self.donor = (
            run_nodes(model, tokens, lambda logits: metric(logits, everyone), sites)
            for tokens in (pairs.base, pairs.donor)
        )

    @torch.no_grad()
    def patched(self, senders: Sequence[Sender], receivers: Sequence[Receiver], batch_rows: int = 64) -> PathEffects:
        """Return the metric when each sender alone is patched on its paths into all receivers together.

        Raises ConfigError if the logits receive beside others, or the model has no such sender or receiver.
        """
        check_path(senders, receivers, self.model.info)
        n_pairs = len(self.pairs.base)
        pair = torch.arange(n_pairs, device=self.pairs.base.device).repeat(len(senders))
        sender = torch.arange(len(senders), device=pair.device).repeat_interleave(n_pairs)
        found = [
            self._rows(senders, receivers, pair[start : start + batch_rows], sender[start : start + batch_rows])
            for start in range(0, len(pair), batch_rows)
        ]
        values = torch.cat(found).view(len(senders), n_pairs).T
        return PathEffects(values, self.base.metric, self.donor.metric, self.mlps)

    def _rows(
        self,
        senders: Sequence[Sender],
        receivers: Sequence[Receiver],
        pair: Int[Tensor, " row"],
        sender: Int[Tensor, " row"],
    ) -> Float[Tensor, " row"]:
        tokens = self.pairs.base[pair]
        isolated = _Isolated(self, senders, receivers, pair, sender)
        with isolated.running():
            logits = last_logits(self.model, tokens, use_cache=False)
        if receivers[0].kind == "logits":
            return self.metric(logits, pair)
        with isolated.receiving():
            return self.metric(last_logits(self.model, tokens, use_cache=False), pair)


class _Isolated:
    """The hooks of steps 2 and 3 for some rows, and what the receivers computed."""

    def __init__(
        self,
        patcher: PathPatcher,
        senders: Sequence[Sender],
        receivers: Sequence[Receiver],
        pair: Int[Tensor, " row"],
        sender: Int[Tensor, " row"],
    ) -> None:
        self.model, self.pair = patcher.model, pair
        self.mlps: MLPs = patcher.mlps
        self.base, self.donor = patcher.base, patcher.donor
        self.rows = {node: (sender == i).nonzero().squeeze(1) for i, node in enumerate(senders)}
        self.receivers = receivers
        self.received: dict[Receiver, Tensor] = {}

    def running(self) -> ExitStack:
        """Hold all heads but the senders, and keep what receivers compute."""
        edits: dict[str, Edit] = {Site("embed").hook: self._with_senders(Site("embed"), only_senders=True)}
        for layer in range(self.model.info.n_layers):
            edits[Site("z", layer).hook] = self._with_senders(Site("z", layer))
            if not self.model.info.attn_only:
                edits[Site("mlp_out", layer).hook] = self._mlp(Site("mlp_out", layer))
        return self._under(edits, self._keep)

    def receiving(self) -> ExitStack:
        """Set the receivers to what they computed."""
        edits: dict[str, Edit] = {
            Site("mlp_out", node.layer).hook: lambda _, node=node: self.received[node]
            for node in self.receivers
            if node.kind == "mlp"
        }
        return self._under(edits, self._replace)

    def _under(self, edits: dict[str, Edit], listener: Any) -> ExitStack:
        stack = ExitStack()
        stack.enter_context(self.model.edited(edits))
        if any(node.kind in "qkv" for node in self.receivers):
            stack.enter_context(listening_to_attention(self.model, listener))
        return stack

    def _with_senders(self, site: Site, only_senders: bool = False) -> Edit:
        def edit(value: Tensor) -> Tensor:
            held = (value if only_senders else self._of(self.base, site)).clone()
            for node, rows in self.rows.items():
                if len(rows) and node.site == site:
                    columns = node.columns(self.model.info)
                    held[rows, :, columns] = self.donor.values[site][self.pair[rows]][:, :, columns]
            return held

        return edit

    def _mlp(self, site: Site) -> Edit:
        hold = self._with_senders(site, only_senders=self.mlps == "recomputed")
        node = Receiver("mlp", site.layer)

        def edit(value: Tensor) -> Tensor | None:
            if node in self.receivers:
                self.received[node] = value
            return hold(value)

        return edit

    def _of(self, run: NodeRun, site: Site) -> Tensor:
        return run.values[site][self.pair]

    def _keep(self, layer: int, call: AttentionCall) -> None:
        for node in self.receivers:
            if node.kind in "qkv" and node.layer == layer:
                self.received[node] = getattr(call, node.kind)[:, node.head]

    def _replace(self, layer: int, call: AttentionCall) -> AttentionCall:
        parts: dict[str, Tensor] = {}
        for node, value in self.received.items():
            if node.kind in "qkv" and node.layer == layer:
                parts.setdefault(node.kind, getattr(call, node.kind).clone())[:, node.head] = value
        return replace(call, **parts)
