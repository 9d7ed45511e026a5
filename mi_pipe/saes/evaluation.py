"""How well an SAE does on activations it was not trained on, and what it costs the model to run on its output.

On held-out rows: FVU, L0, mean cosine of x and x̂, share of features that never fire. In the model: the
cross-entropy of the next token on held-out prompts with the hook point's value left alone (clean), replaced by
x̂ (sae) and by zero (zero), and recovered = (zero - sae) / (zero - clean). Replaced are the positions the store
holds rows for, but not BOS and not massive rows: an SAE never sees those in training, and one wrong massive row
would outweigh all the others.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from mi_pipe.models.model import Model
from mi_pipe.saes.metrics import StreamingFVU, wide_dtype
from mi_pipe.saes.sae import SAE

Replacement = Callable[[Float[Tensor, "position d_in"]], Float[Tensor, "position d_in"]]


@dataclass(frozen=True)
class RowFigures:
    """Metrics over a set of rows."""

    n_rows: int
    fvu: float
    l0: float
    cosine: float
    silent_fraction: float
    """Share of features that fire on none of the rows."""


@dataclass(frozen=True)
class PromptBatch:
    """Prompts padded at the right to one length, and where values may be replaced."""

    tokens: Int[Tensor, "batch pos"]
    is_token: Bool[Tensor, "batch pos"]
    is_replaced: Bool[Tensor, "batch pos"]


@dataclass(frozen=True)
class SpliceFigures:
    """Cross-entropies in nats a token, and the share of the loss recovered."""

    ce_clean: float
    ce_sae: float
    ce_zero: float

    @property
    def ce_recovered(self) -> float:
        """(zero - sae) / (zero - clean); NaN if zero-ablation changes nothing."""
        gap = self.ce_zero - self.ce_clean
        return (self.ce_zero - self.ce_sae) / gap if gap else float("nan")


@torch.no_grad()
def evaluate_rows(sae: SAE, batches: Iterable[Float[Tensor, "batch d_in"]]) -> RowFigures:
    """Return metrics over raw activations; raises ValueError if there are none."""
    fvu = StreamingFVU(sae.d_in, sae.device)
    cosine = torch.zeros((), dtype=wide_dtype(sae.device), device=sae.device)
    fired = torch.zeros(sae.d_sae, dtype=torch.bool, device=sae.device)
    n_active = n_rows = 0
    for batch in batches:
        x = batch.to(sae.device)
        z = sae.encode(x)
        reconstruction = sae.decode(z)
        fvu.update(x, reconstruction)
        cosine += functional.cosine_similarity(x, reconstruction, dim=-1).sum()
        fired |= (z > 0).any(0)
        n_active += int(torch.count_nonzero(z))
        n_rows += x.shape[0]
    if not n_rows:
        raise ValueError("an SAE cannot be evaluated on no rows")
    silent = float((~fired).double().mean())
    return RowFigures(n_rows, fvu.value(), n_active / n_rows, float(cosine) / n_rows, silent)


def pad_prompts(prompts: list[Int[Tensor, " pos"]], is_replaced: list[Bool[Tensor, " pos"]]) -> PromptBatch:
    """Make a batch of prompts; padding at the right cannot reach earlier positions of a causal model."""
    tokens = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True)
    ones = [torch.ones_like(prompt, dtype=torch.bool) for prompt in prompts]
    is_token = torch.nn.utils.rnn.pad_sequence(ones, batch_first=True)
    replaced = torch.nn.utils.rnn.pad_sequence(is_replaced, batch_first=True)
    return PromptBatch(tokens, is_token, replaced)


def zeros(x: Float[Tensor, "position d_in"]) -> Float[Tensor, "position d_in"]:
    """Replace by zero."""
    return torch.zeros_like(x)


@torch.no_grad()
def cross_entropy(
    model: Model, hook: str, batches: Iterable[PromptBatch], replacement: Replacement | None = None
) -> float:
    """Return the mean cross-entropy of the next token over all tokens that have one, in nats.

    `replacement` maps the values at replaced positions, (position, d_in) float32, to others; None leaves the
    model alone.
    """
    total = torch.zeros((), dtype=wide_dtype(model.device), device=model.device)
    n_predicted = 0
    for batch in batches:
        tokens = batch.tokens.to(model.device)
        logits = _logits(model, hook, tokens, batch.is_replaced.to(model.device), replacement)
        is_predicted = batch.is_token[:, 1:].to(model.device)
        total += functional.cross_entropy(
            logits[:, :-1][is_predicted].float(), tokens[:, 1:][is_predicted], reduction="sum"
        )
        n_predicted += int(is_predicted.sum())
    return float(total) / n_predicted


def _logits(
    model: Model, hook: str, tokens: Tensor, is_replaced: Tensor, replacement: Replacement | None
) -> Float[Tensor, "batch pos d_vocab"]:
    if replacement is None:
        return model.logits(tokens)

    def edit(value: Tensor, **_: object) -> Tensor:
        flat = value.reshape(*tokens.shape, -1).clone()
        flat[is_replaced] = replacement(flat[is_replaced].float()).to(flat.dtype)
        return flat.reshape(value.shape)

    if model.hooks[hook].module_path is None:
        return model.bridge.run_with_hooks(tokens, fwd_hooks=[(hook, edit)])
    with model.edited({hook: edit}):
        return model.logits(tokens)
