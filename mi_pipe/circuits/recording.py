"""One run of a model on prompts of one length, with all that its parts read and wrote.

What a head writes is z_h W_O^h, with z the input of the output projection; the projection's bias belongs to
no head, is the same in every run and cancels in differences. All edges work with differences.
"""

from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from mi_pipe.circuits.parts import Block, Parts
from mi_pipe.core.errors import StageError
from mi_pipe.models.model import Edit
from mi_pipe.patching.metrics import logit_diff
from mi_pipe.patching.readout import last_logits, wide
from mi_pipe.prompts.prompt_set import PairGroup

_TOLERANCES = {torch.bfloat16: 0.1, torch.float16: 0.03}
_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Pairs:
    """Clean and corrupted prompts of one length, and the two tokens of the metric."""

    clean: Int[Tensor, "pair pos"]
    corrupted: Int[Tensor, "pair pos"]
    answer: Int[Tensor, " pair"]
    wrong: Int[Tensor, " pair"]

    def __len__(self) -> int:
        """Return the number of pairs."""
        return self.clean.shape[0]

    @classmethod
    def of(cls, group: PairGroup, device: torch.device) -> "Pairs":
        """Put a group of pairs on a device."""
        return cls(*(tensor.to(device) for tensor in (group.clean, group.corrupted, group.answer, group.wrong)))

    def rows(self, start: int, stop: int) -> "Pairs":
        """Return some of the pairs."""
        return Pairs(*(tensor[start:stop] for tensor in (self.clean, self.corrupted, self.answer, self.wrong)))


@dataclass
class Recording:
    """What a run read and wrote, in the model's dtype; lists are by layer, and MLP lists may be empty."""

    embed: Float[Tensor, "pair pos d_model"] = field(init=False)
    heads: list[Float[Tensor, "pair pos head d_head"]] = field(default_factory=list)
    """z of each head."""
    mlps: list[Float[Tensor, "pair pos d_model"]] = field(default_factory=list)
    attention_inputs: list[Float[Tensor, "pair pos d_model"]] = field(default_factory=list)
    """Residual stream before the attention's normalisation."""
    mlp_inputs: list[Float[Tensor, "pair pos d_model"]] = field(default_factory=list)
    """Residual stream before the MLP's normalisation."""
    mlp_normed: list[Float[Tensor, "pair pos d_model"]] = field(default_factory=list)
    """What the MLP is called with."""
    projected: list[list[Float[Tensor, "pair pos d_out"]]] = field(default_factory=list)
    """Output of each projection to q, k and v."""
    final_input: Float[Tensor, "pair pos d_model"] = field(init=False)
    metric: Float[Tensor, " pair"] = field(init=False)
    """Logit difference at the last position, float32."""


def record(
    parts: Parts,
    tokens: Int[Tensor, "pair pos"],
    answer: Int[Tensor, " pair"],
    wrong: Int[Tensor, " pair"],
    embed: Float[Tensor, "pair pos d_model"] | None = None,
    with_gradients: bool = False,
) -> Recording:
    """Run the model, from `embed` in place of the tokens' own embeddings if given, and record it.

    With gradients, the recorded tensors stay in autograd's graph from the embedding on, so that
    `torch.autograd.grad(recording.metric.sum(), ...)` gives the gradient at each of them.
    """
    seen = Recording()

    def enter(value: Tensor) -> Tensor:
        seen.embed = (value if embed is None else embed).detach().requires_grad_(with_gradients)
        return seen.embed

    def leave(value: Tensor) -> Tensor:
        seen.final_input = value.view_as(value)
        return seen.final_input

    edits: dict[str, Edit] = {"ln_final.hook_in": leave}
    with ExitStack() as stack, torch.set_grad_enabled(with_gradients):
        for layer, block in enumerate(parts.blocks):
            edits |= _block_edits(layer, block, seen)
            seen.projected.append([])
            for projection in block.projections:
                keep = seen.projected[layer].append
                handle = projection.module.register_forward_hook(lambda _module, _args, out, keep=keep: keep(out))
                stack.callback(handle.remove)
        stack.enter_context(parts.model.edited({"blocks.0.hook_resid_pre": enter}))
        seen.metric = run_metric(parts, tokens, answer, wrong, edits)
    return seen


def run_metric(
    parts: Parts,
    tokens: Int[Tensor, "pair pos"],
    answer: Int[Tensor, " pair"],
    wrong: Int[Tensor, " pair"],
    edits: dict[str, Edit],
) -> Float[Tensor, " pair"]:
    """Run the model under `edits` and return the logit difference; only the last position is unembedded."""
    with parts.model.edited(edits):
        return logit_diff(last_logits(parts.model, tokens, use_cache=False), answer, wrong)


def _block_edits(layer: int, block: Block, seen: Recording) -> dict[str, Edit]:
    name = f"blocks.{layer}."

    def keep_heads(value: Tensor) -> None:
        seen.heads.append(rearrange(value, "b s (h k) -> b s h k", h=block.n_heads))

    def enter_mlp(value: Tensor) -> Tensor:
        # A view of its own: where attention and MLP share a normalisation, the gradient here is the MLP's alone.
        seen.mlp_normed.append(value.view_as(value))
        return seen.mlp_normed[-1]

    edits: dict[str, Edit] = {f"{name}ln1.hook_in": seen.attention_inputs.append, f"{name}attn.o.hook_in": keep_heads}
    if block.mlp_norm is None:
        return edits
    edits |= {f"{name}mlp.hook_in": enter_mlp, f"{name}mlp.hook_out": seen.mlps.append}
    if block.mlp_norm is block.attention_norm:
        edits[f"{name}ln1.hook_in"] = lambda value: _append_all(value, seen.attention_inputs, seen.mlp_inputs)
    else:
        edits[f"{name}ln2.hook_in"] = seen.mlp_inputs.append
    return edits


def _append_all(value: Tensor, *lists: list[Tensor]) -> None:
    for entries in lists:
        entries.append(value)


def written_by_heads(
    block: Block, z: Float[Tensor, "pair pos head d_head"], heads: Int[Tensor, " head"] | None = None
) -> Float[Tensor, "pair head pos d_model"]:
    """Return z_h W_O^h (of a z, or of a difference of two) of all heads, or of those listed; float32."""
    weights = block.head_weights()
    return torch.einsum("bshk,hkm->bhsm", wide(z), wide(weights if heads is None else weights[heads]))


def written_difference(parts: Parts, run: Recording, base: Recording) -> Float[Tensor, "pair writer pos d_model"]:
    """Return what each writer adds to the residual stream in `run` less what it adds in `base`, float32."""
    graph = parts.graph
    n_pairs, n_pos, d_model = base.embed.shape
    with torch.no_grad():
        embed = wide(run.embed) - wide(base.embed)
        written = embed.new_empty(n_pairs, graph.n_writers, n_pos, d_model)
        written[:, 0] = embed
        for layer, block in enumerate(parts.blocks):
            first = graph.first_head(layer)
            z = wide(run.heads[layer]) - wide(base.heads[layer])
            written[:, first : first + graph.n_heads] = written_by_heads(block, z)
            if graph.has_mlp:
                written[:, graph.mlp_writer(layer)] = wide(run.mlps[layer]) - wide(base.mlps[layer])
    return written


def check_residual_sum(
    parts: Parts, run: Recording, base: Recording, written: Float[Tensor, "pair writer pos d_model"]
) -> float:
    """Return the largest relative error of "what a reader receives is the sum of what was written before it".

    Raises StageError if it is beyond rounding: the model normalises or scales what a part writes.
    """
    graph = parts.graph
    inputs: dict[int, tuple[Tensor, Tensor]] = {graph.n_readers - 1: (run.final_input, base.final_input)}
    for layer in range(graph.n_layers):
        inputs[graph.first_projection(layer)] = (run.attention_inputs[layer], base.attention_inputs[layer])
        if graph.has_mlp:
            inputs[graph.mlp_reader(layer)] = (run.mlp_inputs[layer], base.mlp_inputs[layer])
    worst = 0.0
    for reader, (here, there) in inputs.items():
        received = wide(here.detach()) - wide(there.detach())
        error = received - written[:, : graph.n_sources[reader]].sum(1)
        worst = max(worst, float(error.abs().max() / received.abs().max().clamp_min(1e-6)))
    if worst > _TOLERANCES.get(parts.model.dtype, _TOLERANCE):
        raise StageError(
            f"No circuits for {parts.model.info.architecture}: what its heads and MLPs write does not sum to its "
            f"residual stream (relative error {worst:.2g}); it normalises or scales a block's output before adding it."
        )
    return worst
