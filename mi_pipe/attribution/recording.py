"""One run of a model with the values at its nodes, and the metric's gradient at each of them.

A run may start from other embeddings, and may have the value of one site replaced; the replacement is then the leaf
that gradients are taken at. Only the last position is unembedded.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mi_pipe.attribution.attention_calls import AttentionCall, listening_to_attention, only_watch
from mi_pipe.attribution.nodes import Kind, Site, own_hook
from mi_pipe.core.errors import StageError
from mi_pipe.models.model import Edit, Model
from mi_pipe.patching.readout import last_logits

RunMetric = Callable[[Float[Tensor, "pair d_vocab"]], Float[Tensor, " pair"]]
"""The metric of every pair from the logits at the last position, float32 at least; differentiable."""
_INSIDE: tuple[Kind, ...] = ("q", "k", "v")
_ADDED: tuple[Kind, ...] = ("attn_out", "mlp_out")
_EMBED = "blocks.0.hook_resid_pre"
_TOLERANCES = {torch.bfloat16: 0.1, torch.float16: 0.03}
_TOLERANCE = 1e-3


@dataclass
class NodeRun:
    """What a run had at its sites; tensors belong to autograd's graph if it ran with gradients."""

    values: dict[Site, Tensor]
    calls: dict[int, AttentionCall]
    """What each layer's attention was computed from, of runs that look into attention."""
    metric: Float[Tensor, " pair"]

    def gradients(self, sites: Sequence[Site], keep_graph: bool = False) -> dict[Site, Tensor]:
        """Return the metric's gradient at these sites (of each pair its own metric's)."""
        wanted = [self.values[site] for site in sites]
        found = torch.autograd.grad(
            self.metric.sum(), wanted, retain_graph=keep_graph, allow_unused=True, materialize_grads=True
        )
        return dict(zip(sites, found, strict=True))


def run_nodes(
    model: Model,
    tokens: Int[Tensor, "pair pos"],
    metric: RunMetric,
    sites: Sequence[Site],
    *,
    embed: Float[Tensor, "pair pos d_model"] | None = None,
    start: Mapping[Site, Tensor] | None = None,
    with_gradients: bool = False,
) -> NodeRun:
    """Run the model and keep the values at `sites`.

    `embed` takes the place of the tokens' own embeddings, and each value in `start` that of its site's. With gradients
    the embeddings and the replaced values are leaves, so that what is before them is not differentiated.
    """
    run = NodeRun({}, {}, torch.empty(0))
    start = {site: value.detach().requires_grad_(with_gradients) for site, value in (start or {}).items()}
    edits = _Edits(model, run, sites, start, len(tokens))

    def enter(value: Tensor) -> Tensor:
        return (value if embed is None else embed).detach().requires_grad_(with_gradients and not start)

    with ExitStack() as stack, torch.set_grad_enabled(with_gradients):
        if edits.looks_into_attention:
            stack.enter_context(listening_to_attention(model, edits.listen))
        stack.enter_context(model.edited({_EMBED: enter}))
        for edit in edits.by_hook:
            stack.enter_context(model.edited(edit))
        run.metric = metric(last_logits(model, tokens, use_cache=False))
    return run


class _Edits:
    """What is done at hook points and in attention during one run."""

    def __init__(
        self, model: Model, run: NodeRun, sites: Sequence[Site], start: Mapping[Site, Tensor], n_pairs: int
    ) -> None:
        self.run, self.start, self.n_pairs = run, start, n_pairs
        self.sites = {*sites, *start}
        self.looks_into_attention = any(site.is_inside_attention for site in self.sites)
        self.by_hook: list[dict[str, Edit]] = []
        for site in sorted(site for site in self.sites if not site.is_inside_attention):
            is_mid = site.kind == "resid_mid" and site in start
            self.by_hook += self._mid(site) if is_mid else [{own_hook(site, model.hooks): self._at(site)}]

    def _at(self, site: Site) -> Edit:
        def edit(value: Tensor) -> Tensor | None:
            is_flat = value.ndim == 2  # noqa: PLR2004 (OPT's MLPs know no batch)
            own = value.unflatten(0, (self.n_pairs, -1)) if is_flat else value
            kept = self.run.values[site] = self.start.get(site, own)
            if kept is value and site.kind not in _ADDED:
                return None
            # Falcon adds the attention's output to the MLP's in place: what is kept must stay what it was.
            return kept.clone().reshape(value.shape)

        return edit

    def _mid(self, site: Site) -> list[dict[str, Edit]]:
        """Replace resid_mid, which no module puts out, by way of what attention adds to resid_pre."""
        before: list[Tensor] = []
        wanted = self.run.values[site] = self.start[site]
        return [
            {Site("resid_pre", site.layer).hook: before.append},
            {Site("attn_out", site.layer).hook: lambda _: wanted - before[-1]},
        ]

    def listen(self, layer: int, call: AttentionCall) -> AttentionCall:
        sites: dict[str, Site] = {kind: Site(kind, layer) for kind in _INSIDE}
        parts = {kind: self.start[site] for kind, site in sites.items() if site in self.start}
        call = self.run.calls[layer] = replace(call, **parts)
        self.run.values |= {site: getattr(call, kind) for kind, site in sites.items() if site in self.sites}
        return call


@torch.no_grad()
def check_watched_attention(model: Model, tokens: Int[Tensor, "pair pos"]) -> float:
    """Return the largest error of the logits when attention is watched, as a fraction of the largest logit.

    Raises StageError if it is beyond rounding: the model's attention does more than `attention_calls` knows of.
    """
    own = last_logits(model, tokens, use_cache=False)
    with listening_to_attention(model, only_watch):
        watched = last_logits(model, tokens, use_cache=False)
    error = float((watched - own).abs().max() / own.abs().max().clamp_min(1e-9))
    if not error <= _TOLERANCES.get(model.dtype, _TOLERANCE):
        raise StageError(
            f"q, k and v of {model.info.architecture} cannot be attributed to: its attention does more than scaled, "
            f"capped and masked dot products (relative error {error:.2g}). Leave the kinds q, k and v out."
        )
    return error
