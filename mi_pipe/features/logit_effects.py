"""Which tokens a feature promotes and suppresses when it writes straight to the logits.

For a decoder direction d in the residual stream the effect on the logits is

    effect = (w * C d) @ W_U

with C the centring of a LayerNorm (d minus its mean; for RMSNorm and no norm, d itself), w the final norm's weight
and W_U the unembedding. That is the change of the logits, up to the positive scale 1/sigma that the final norm
applies at a given position, when the feature's activation grows by one: later layers, biases, and a soft cap or
scaling of the logits are left out (the direct path of Elhage et al. 2021, with the norm folded as TransformerLens
does). Features are taken in chunks, so that no more than `EFFECT_ENTRIES` logits exist at once.

The norm's w and C are measured by calling it, so that every architecture's own norm counts as it is (Gemma's
1 + weight, norms without weights, no norm at all).
"""

import re
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float32, Int32
from torch import Tensor, nn

from mi_pipe.core.errors import ModelError

EFFECT_ENTRIES = 1 << 24
"""Largest (feature, token) piece: 64 MiB in float32."""
_PROBE_SIZE = 1024.0
_TOLERANCE = 3e-2
"""Relative; wide enough for a norm in bfloat16."""
_MIN_WIDTH = 3


_RESIDUAL_HOOK = re.compile(
    r"(blocks\.\d+\.(hook_(resid_(pre|mid|post)|attn_out|mlp_out|in|out)|(attn|mlp)\.hook_out)"
    r"|hook_(pos_)?embed|(pos_)?embed\.hook_out)"
)


def writes_to_residual(hook: str) -> bool:
    """Say whether the values at a hook point are in the residual stream's basis, so that they reach the logits.

    >>> writes_to_residual("blocks.3.hook_mlp_out"), writes_to_residual("blocks.3.attn.hook_z")
    (True, False)
    """
    return _RESIDUAL_HOOK.fullmatch(hook) is not None


@dataclass(frozen=True)
class FoldedNorm:
    """The linear part of a normalisation."""

    weight: Float[Tensor, " d_model"]
    is_centred: bool
    """True if the norm takes the mean away first (LayerNorm)."""

    def apply(self, directions: Float[Tensor, "feature d_model"]) -> Float[Tensor, "feature d_model"]:
        """Return w * C d for each direction."""
        if self.is_centred:
            directions = directions - directions.mean(-1, keepdim=True)
        return directions * self.weight


@torch.no_grad()
def fold_norm(norm: nn.Module, d_model: int, like: Tensor) -> FoldedNorm:
    """Measure the linear part of `norm`, on the device and dtype of `like`.

    Only the odd part o(x) = (norm(x) - norm(-x)) / 2 is used, from which biases are gone. With a probe p of mean 0
    whose size makes epsilon vanish, o(p) = w p / rms(p) for any norm that divides by its scale; a norm that does
    not divide (identity) has o(2p) = 2 o(p); only a norm that centres does not see a constant added. The result
    is then compared with the norm on another vector. Raises ModelError if they disagree.
    """

    def odd(values: Tensor, shift: float = 0.0) -> Tensor:
        values = values.to(like)
        return (norm(values + shift) - norm(shift - values)).float() / 2

    probe = _balanced_probe(d_model).to(like.device)
    size = probe.square().mean().sqrt()
    divides = not _close(odd(2 * probe), 2 * odd(probe))
    is_centred = divides and _close(odd(probe, shift=_PROBE_SIZE), odd(probe))
    folded = FoldedNorm(odd(probe) / probe * (size if divides else 1.0), is_centred)
    other = torch.cos(torch.arange(d_model, device=like.device)) * _PROBE_SIZE
    centred = other - other.mean() if is_centred else other
    expected = folded.apply(other[None])[0] / (centred.square().mean().sqrt() if divides else 1.0)
    if not _close(odd(other), expected):
        raise ModelError(f"The final norm {type(norm).__name__} is not a LayerNorm, RMSNorm or identity.")
    return folded


def _balanced_probe(d_model: int) -> Float[Tensor, " d_model"]:
    """Return a vector of mean 0 without zeros: +1, -1, +1, …, and for an odd width -2 at its middle of three."""
    if d_model < _MIN_WIDTH - 1:
        raise ModelError(f"A model of width {d_model} has no final norm that can be folded.")
    probe = torch.ones(d_model)
    probe[1::2] = -1
    if d_model % 2:
        probe[-2] = -2
    return probe * _PROBE_SIZE


def _close(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() <= _TOLERANCE * b.abs().max())


@dataclass(frozen=True)
class LogitEffects:
    """The tokens of largest effect, most promoted and most suppressed first."""

    promoted: Int32[np.ndarray, "feature rank"]
    promoted_effect: Float32[np.ndarray, "feature rank"]
    suppressed: Int32[np.ndarray, "feature rank"]
    suppressed_effect: Float32[np.ndarray, "feature rank"]


_NOTHING = (np.zeros((0, 0), np.int32), np.zeros((0, 0), np.float32))
NO_EFFECTS = LogitEffects(*_NOTHING, *_NOTHING)
"""Those of directions that do not write into the residual stream, or of an unknown model."""


@torch.no_grad()
def logit_effects(
    directions: Float[Tensor, "feature d_model"],
    norm: FoldedNorm,
    unembedding: Float[Tensor, "d_model d_vocab"],
    n_tokens: int,
) -> LogitEffects:
    """Return the `n_tokens` most promoted and most suppressed tokens of each direction, computed in float32."""
    n_tokens = min(n_tokens, unembedding.shape[1])
    step = max(1, EFFECT_ENTRIES // unembedding.shape[1])
    matrix = unembedding.float()
    parts: list[list[np.ndarray]] = []
    for start in range(0, max(len(directions), 1), step):
        effect = norm.apply(directions[start : start + step].to(matrix)) @ matrix
        high, low = effect.topk(n_tokens), effect.topk(n_tokens, largest=False)
        parts.append([part.cpu().numpy() for part in (high.indices, high.values, low.indices, low.values)])
    promoted, promoted_effect, suppressed, suppressed_effect = (
        np.concatenate(part) for part in zip(*parts, strict=True)
    )
    return LogitEffects(promoted.astype(np.int32), promoted_effect, suppressed.astype(np.int32), suppressed_effect)
