"""Direct logit attribution: what every component writes straight to the difference of two logits, exactly.

At the last position the residual stream is the sum of what the embedding, the position embedding, every head, every
attention output bias and every MLP (its own biases included) wrote. With the final norm's scale held at what it was in
this very run (likewise that of a norm on the attention's output, as Gemma has), the logits are linear in that sum, so

    logit[answer] - logit[wrong] = sum of contributions + bias

with `bias` what the final norm's and the unembedding's biases add. A head's contribution is <z W_O, d> with d the
direction of the residual stream that the difference reads. A value bias counts as its head's, since attention sums
to 1. A factor on what blocks write (Granite) or on the logits (Cohere, Granite) is part of every contribution. A soft
cap of the logits (Gemma 2) is not linear and comes after this sum: the logit difference is then the one before it.

Steps, for prompts of one length:
1. run the plain model, keep z, attention and MLP outputs, and the first and last residual stream, at the last position,
   and see that the logits are those of the unembedding times the known factor, soft-capped;
2. measure the final norm there, and take the difference's direction back through it;
3. project each component; check that their sum is the model's own logit difference.
"""

from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from mi_pipe.core.errors import StageError
from mi_pipe.heads.final_readout import measure_norm, post_attention_norm, token_biases, token_directions
from mi_pipe.models.head_weights import head_weights
from mi_pipe.models.hook_points import HookMap
from mi_pipe.models.info import ModelInfo
from mi_pipe.models.logit_map import LogitMap
from mi_pipe.models.model import Edit, Model, as_logits
from mi_pipe.models.reading import listening

_TOLERANCES = {torch.float64: 1e-6, torch.bfloat16: 0.1, torch.float16: 0.03}
_TOLERANCE = 1e-3
_POSITIONS = "pos_embed.hook_out"


@dataclass(frozen=True)
class DirectLogitAttribution:
    """Contributions to the logit difference at the last position, one row a prompt, float64."""

    embed: Float[np.ndarray, " pair"]
    """What enters the first block, less the position embedding."""
    pos_embed: Float[np.ndarray, " pair"]
    """0 where positions are not embedded."""
    heads: Float[np.ndarray, "pair layer head"]
    attn_bias: Float[np.ndarray, "pair layer"]
    mlps: Float[np.ndarray, "pair layer"]
    """0 where there are none."""
    bias: Float[np.ndarray, " pair"]
    logit_diff: Float[np.ndarray, " pair"]
    """The model's own, before a soft cap."""

    @property
    def total(self) -> Float[np.ndarray, " pair"]:
        """The sum of all contributions."""
        by_layer = self.heads.sum((1, 2)) + self.attn_bias.sum(1) + self.mlps.sum(1)
        return self.embed + self.pos_embed + by_layer + self.bias


@dataclass
class _Seen:
    """Values of one run at the last position, by hook point."""

    values: dict[str, Tensor]
    positions: Tensor | None = None


def check_direct_logit_attribution(hooks: HookMap, info: ModelInfo) -> None:
    """Raise HookPointError if the model has no modules to read the components from; needs no weights."""
    for name in (*_names(hooks, info), "ln_final.hook_in", "unembed.hook_out"):
        hooks[name]


@torch.no_grad()
def direct_logit_attribution(
    model: Model, tokens: Int[Tensor, "pair pos"], answer: Int[Tensor, " pair"], wrong: Int[Tensor, " pair"]
) -> DirectLogitAttribution:
    """Return the contributions; raises StageError where they do not sum to the model's logit difference."""
    answer, wrong = answer.to(model.device), wrong.to(model.device)
    seen = _run(model, tokens)
    values = seen.values
    norm = measure_norm(model.final_norm, values["ln_final.hook_in"])
    factor = LogitMap.of(model.module).factor
    wanted = (token_directions(model, answer) - token_directions(model, wrong)) * factor
    direction = norm.transposed(wanted).double()
    from_blocks = direction * _block_factor(model)
    heads, attn_bias = _attention(model, values, from_blocks)
    positions = direction.new_zeros(len(direction)) if seen.positions is None else direction @ seen.positions.double()
    logits = values["unembed.hook_out"].double() * factor
    token_bias = (token_biases(model, answer) - token_biases(model, wrong)).double() * factor
    found = DirectLogitAttribution(
        embed=_numpy(_project(values["blocks.0.hook_resid_pre"], direction) - positions),
        pos_embed=_numpy(positions),
        heads=_numpy(heads),
        attn_bias=_numpy(attn_bias),
        mlps=_numpy(_mlps(model, values, from_blocks)),
        bias=_numpy((norm.bias * wanted).double().sum(-1) + token_bias),
        logit_diff=_numpy((logits.gather(1, answer[:, None]) - logits.gather(1, wrong[:, None])).squeeze(1)),
    )
    _check(found, model, float(logits.abs().max()))
    return found


def _run(model: Model, tokens: Int[Tensor, "pair pos"]) -> _Seen:
    seen = _Seen({})

    def taker(name: str) -> Edit:
        def take(value: Tensor) -> None:
            # OPT's MLPs know no batch; Falcon adds to a value in place later.
            seen.values[name] = value.detach().reshape(len(tokens), -1, value.shape[-1])[:, -1].clone()

        return take

    def take_positions(_name: str, value: Tensor) -> None:
        seen.positions = value.detach().reshape(-1, value.shape[-1])[-1]

    edits = {name: taker(name) for name in (*_names(model.hooks, model.info), "ln_final.hook_in", "unembed.hook_out")}
    has_positions = _POSITIONS in model.hooks and model.hooks[_POSITIONS].reading is not None
    readings = {_POSITIONS: model.hooks[_POSITIONS].reading} if has_positions else {}
    edits |= {
        name: taker(name)
        for layer in range(model.info.n_layers)
        if (name := f"blocks.{layer}.ln1_post.hook_in") in model.hooks
    }
    with model.edited(edits), listening(model.module, readings, take_positions):  # pyright: ignore[reportArgumentType]
        own = as_logits(model.module(tokens.to(model.device)))[:, -1]
    _check_logits(model, own, seen.values["unembed.hook_out"])
    return seen


def _names(hooks: HookMap, info: ModelInfo) -> list[str]:
    layers = range(info.n_layers)
    mlps = [] if info.attn_only else [_mlp_hook(hooks, layer) for layer in layers]
    return ["blocks.0.hook_resid_pre", *(f"blocks.{layer}.attn.hook_z" for layer in layers), *mlps]


def _mlp_hook(hooks: HookMap, layer: int) -> str:
    """Return where an MLP's output is, before what the model multiplies it by (Granite)."""
    name = f"blocks.{layer}.hook_mlp_out"
    return name if hooks[name].module_path is not None else f"blocks.{layer}.mlp.hook_out"


def _attention(
    model: Model, values: dict[str, Tensor], direction: Float[Tensor, "pair d_model"]
) -> tuple[Float[Tensor, "pair layer head"], Float[Tensor, "pair layer"]]:
    """Return the contributions of heads and of output biases, with the bias of a norm on the attention's output."""
    heads, biases = [], []
    for layer in range(model.info.n_layers):
        weights = head_weights(model, layer)
        read, bias = direction, direction.new_zeros(len(direction))
        post_norm = post_attention_norm(model, layer)
        if post_norm is not None:
            norm = measure_norm(post_norm, values[f"blocks.{layer}.ln1_post.hook_in"])
            read, bias = norm.transposed(direction), _project(norm.bias, direction)
        if weights.b_O is not None:
            bias = bias + read @ weights.b_O.double()
        z = rearrange(values[f"blocks.{layer}.attn.hook_z"], "b ... -> b (...)")
        by_head = rearrange(z, "b (h k) -> b h k", h=weights.n_heads).double()
        heads.append(torch.einsum("bhk,hkm,bm->bh", by_head, weights.W_O.double(), read))
        biases.append(bias)
    return torch.stack(heads, 1), torch.stack(biases, 1)


def _mlps(
    model: Model, values: dict[str, Tensor], direction: Float[Tensor, "pair d_model"]
) -> Float[Tensor, "pair layer"]:
    if model.info.attn_only:
        return direction.new_zeros(len(direction), model.info.n_layers)
    outputs = [values[_mlp_hook(model.hooks, layer)] for layer in range(model.info.n_layers)]
    return torch.stack([_project(output, direction) for output in outputs], 1)


def _block_factor(model: Model) -> float:
    """Return what a model multiplies the outputs of attention and MLP by before it adds them (Granite)."""
    return float(getattr(getattr(model.module, "config", None), "residual_multiplier", None) or 1.0)


def _project(values: Float[Tensor, "pair d_model"], direction: Float[Tensor, "pair d_model"]) -> Float[Tensor, " pair"]:
    return (values.double() * direction).sum(-1)


def _numpy(values: Tensor) -> np.ndarray:
    return values.cpu().numpy()


def _check_logits(model: Model, own: Tensor, unembedded: Tensor) -> None:
    error = float((LogitMap.of(model.module)(unembedded) - own).abs().max() / own.abs().max().clamp_min(1e-9))
    if not error <= _TOLERANCES.get(model.dtype, _TOLERANCE):
        raise StageError(
            f"No direct logit attribution for {model.info.architecture}: it changes its unembedding's logits in a way "
            f"not known here (off by {error:.2g} of the largest)."
        )


def _check(found: DirectLogitAttribution, model: Model, size: float) -> None:
    error = float(np.abs(found.total - found.logit_diff).max()) / max(size, 1e-9)
    if not error <= _TOLERANCES.get(model.dtype, _TOLERANCE):
        raise StageError(
            f"No direct logit attribution for {model.info.architecture}: its components do not sum to its logits "
            f"(off by {error:.2g} of the largest); it scales what its blocks write in a way not known here."
        )
