"""The hooks of path patching for one batch of rows: what is held, what sends, and what the receivers compute."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

from jaxtyping import Int
from torch import Tensor

from mi_pipe.attribution.attention_calls import AttentionCall, listening_to_attention
from mi_pipe.attribution.nodes import Site, own_hook
from mi_pipe.attribution.path_nodes import MLPs, Receiver, Sender
from mi_pipe.attribution.path_runs import PathRuns
from mi_pipe.models.model import Edit, Model


@dataclass(frozen=True)
class PathRows:
    """Which pair and which sender each row of a batch is of; values begin at position `first_pos`."""

    senders: Sequence[Sender]
    pair: Int[Tensor, " row"]
    sender: Int[Tensor, " row"]
    """Number of the row's sender."""
    first_pos: int = 0


@dataclass
class Isolation:
    """Isolates the senders of some rows, keeps what the receivers compute, and gives it to them."""

    model: Model
    runs: PathRuns
    receivers: Sequence[Receiver]
    mlps: MLPs
    rows: PathRows
    received: dict[Receiver, Tensor] = field(default_factory=dict)

    def running(self) -> ExitStack:
        """Hold all heads but the senders, and keep what receivers compute."""
        edits: dict[str, Edit] = {self._hook(Site("embed")): self._sending(Site("embed"))}
        for layer in range(self.model.info.n_layers):
            edits[self._hook(Site("z", layer))] = self._held(Site("z", layer))
            if not self.model.info.attn_only:
                edits[self._hook(Site("mlp_out", layer))] = self._mlp(Site("mlp_out", layer))
        return self._under(edits, self._keep)

    def receiving(self) -> ExitStack:
        """Set the receivers to what they computed."""
        edits: dict[str, Edit] = {
            self._hook(Site("mlp_out", node.layer)): lambda _, node=node: self.received[node]
            for node in self.receivers
            if node.kind == "mlp"
        }
        return self._under(edits, self._replace)

    def sends(self, site: Site) -> bool:
        """Say whether any row's sender is there."""
        return any(sender.site == site for sender in self.rows.senders)

    def _under(self, edits: dict[str, Edit], listener: Any) -> ExitStack:
        stack = ExitStack()
        stack.enter_context(self.model.edited(edits))
        if any(node.kind in "qkv" for node in self.receivers):
            stack.enter_context(listening_to_attention(self.model, listener))
        return stack

    def _hook(self, site: Site) -> str:
        return own_hook(site, self.model.hooks)

    def _sending(self, site: Site) -> Edit:
        """Put in what is sent, if anything is."""
        return (lambda value: self._with_senders(site, value, value)) if self.sends(site) else lambda _: None

    def _held(self, site: Site) -> Edit:
        """Put in the base run's value, with what is sent."""
        rows = self.rows
        return lambda value: self._with_senders(
            site, self.runs.of_base(self._hook(site), rows.pair, rows.first_pos), value
        )

    def _with_senders(self, site: Site, held: Tensor, value: Tensor) -> Tensor:
        """Return `held` with what is sent, in the shape of `value`: OPT's MLPs know no batch."""
        rows, held = self.rows, held.reshape(len(self.rows.pair), -1, value.shape[-1]).clone()
        for number, sender in enumerate(rows.senders):
            if sender.site == site:
                here, columns = (rows.sender == number).nonzero().squeeze(1), sender.columns(self.model.info)
                donor = self.runs.of_donor(self._hook(site), rows.pair[here], rows.first_pos)
                held[here, :, columns] = donor[:, :, columns]
        return held.reshape(value.shape)

    def _mlp(self, site: Site) -> Edit:
        put = self._held(site) if self.mlps == "frozen" else self._sending(site)
        node = Receiver("mlp", site.layer)

        def edit(value: Tensor) -> Tensor | None:
            if node in self.receivers:
                # Falcon adds the attention's output to it in place.
                self.received[node] = value.clone()
            return put(value)

        return edit

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
