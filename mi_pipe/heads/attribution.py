"""Direct logit attribution: what every component writes straight to the difference of two logits, exactly.

At the last position the residual stream is the sum of what the embedding, the position embedding, every head, every
attention output bias and every MLP (its own biases included) wrote. With the final norm's scale held at what it was in
this very run (likewise that of a norm on the attention's output, as Gemma has), the logits are linear in that sum, so

    logit[answer] - logit[wrong] = sum of contributions + bias

with `bias` what the final norm's and the unembedding's biases add. A head's contribution is <z W_O, d> with d the
direction of the residual stream that the difference reads. A value bias counts as its head's, since attention sums
to 1. A soft cap or scale that a model applies to its logits afterwards (Gemma, Cohere) comes after this sum.

Steps, for prompts of one length:
1. run the plain model, keep z, attention and MLP outputs, and the first and last residual stream, at the last position;
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
from mi_pipe.models.model import Edit, Model
from mi_pipe.models.reading import listening

_TOLERANCES = {torch.float64: 1e-6, torch.bfloat16: 0.1, torch.float16: 0.03}
_TOLERANCE = 1e-3
_POSITIONS = "pos_embed.hook_out"


@dataclass(frozen=True)
class Attribution:
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


def check_attribution(hooks: HookMap, info: ModelInfo) -> None:
    """Raise HookPointError if the model has no modules to read the components from; needs no weights."""
    for name in (*_names(info), "ln_final.hook_in", "unembed.hook_out"):
        hooks[name]


@torch.no_grad()
def attribute_logit_diff(
    model: Model, tokens: Int[Tensor, "pair pos"], answer: Int[Tensor, " pair"], wrong: Int[Tensor, " pair"]
) -> Attribution:
    """Return the contributions; raises StageError where they do not sum to the model's logit difference."""
    answer, wrong = answer.to(model.device), wrong.to(model.device)
    seen = _run(model, tokens)
    values = seen.values
    norm = measure_norm(model.final_norm, values["ln_final.hook_in"])
    wanted = token_directions(model, answer) - token_directions(model, wrong)
    direction = norm.transposed(wanted).double()
    heads, attn_bias = _attention(model, values, direction)
    positions = direction.new_zeros(len(direction)) if seen.positions is None else direction @ seen.positions.double()
    logits = values["unembed.hook_out"].double()
    bias = (norm.bias * wanted).double().sum(-1) + (token_biases(model, answer) - token_biases(model, wrong)).double()
    found = Attribution(
        embed=_numpy(_project(values["blocks.0.hook_resid_pre"], direction) - positions),
        pos_embed=_numpy(positions),
        heads=_numpy(heads),
        attn_bias=_numpy(attn_bias),
        mlps=_numpy(_mlps(model, values, direction)),
        bias=_numpy(bias),
        logit_diff=_numpy((logits.gather(1, answer[:, None]) - logits.gather(1, wrong[:, None])).squeeze(1)),
    )
    _check(found, model, float(logits.abs().max()))
    return found


def _run(model: Model, tokens: Int[Tensor, "pair pos"]) -> _Seen:
    seen = _Seen({})

    def taker(name: str) -> Edit:
        def take(value: Tensor) -> None:
            seen.values[name] = value[:, -1].detach()

        return take

    def take_positions(_name: str, value: Tensor) -> None:
        seen.positions = value.detach().reshape(-1, value.shape[-1])[-1]

    edits = {name: taker(name) for name in (*_names(model.info), "ln_final.hook_in", "unembed.hook_out")}
    has_positions = _POSITIONS in model.hooks and model.hooks[_POSITIONS].reading is not None
    readings = {_POSITIONS: model.hooks[_POSITIONS].reading} if has_positions else {}
    edits |= {
        name: taker(name)
        for layer in range(model.info.n_layers)
        if (name := f"blocks.{layer}.ln1_post.hook_in") in model.hooks
    }
    with model.edited(edits), listening(model.module, readings, take_positions):  # pyright: ignore[reportArgumentType]
        model.module(tokens.to(model.device))
    return seen


def _names(info: ModelInfo) -> list[str]:
    parts = ["attn.hook_z", *([] if info.attn_only else ["hook_mlp_out"])]
    return ["blocks.0.hook_resid_pre", *(f"blocks.{i}.{part}" for i in range(info.n_layers) for part in parts)]


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
    outputs = [values[f"blocks.{layer}.hook_mlp_out"] for layer in range(model.info.n_layers)]
    return torch.stack([_project(output, direction) for output in outputs], 1)


def _project(values: Float[Tensor, "pair d_model"], direction: Float[Tensor, "pair d_model"]) -> Float[Tensor, " pair"]:
    return (values.double() * direction).sum(-1)


def _numpy(values: Tensor) -> np.ndarray:
    return values.cpu().numpy()


def _check(found: Attribution, model: Model, size: float) -> None:
    error = float(np.abs(found.total - found.logit_diff).max()) / max(size, 1e-9)
    if not error <= _TOLERANCES.get(model.dtype, _TOLERANCE):
        raise StageError(
            f"No direct logit attribution for {model.info.architecture}: its components do not sum to its logits "
            f"(off by {error:.2g} of the largest); it scales what its blocks write in a way not known here."
        )
