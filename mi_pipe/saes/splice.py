"""What it costs the model to run on an SAE's output: the SAE spliced in at its hook point.

The cross-entropy of the next token on held-out prompts with the hook point's value left alone (clean), replaced by x̂
(sae) and by zero (zero); recovered = (zero - sae) / (zero - clean); and KL(clean ‖ sae) of the next token's
distribution, in nats a token. Replaced are the positions the store holds rows for, but not BOS and not massive rows: an
SAE never sees those in training, and one wrong massive row would outweigh all the others.

A transcoder's output is replaced by what it makes of its input in the same pass. A crosscoder's hook points are
replaced one at a time by what it makes of all of them in the model left alone; its figures are means over them.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from mi_pipe.models.model import Model
from mi_pipe.saes.metrics import wide_dtype
from mi_pipe.saes.sae import SAE

Replacement = Callable[[Float[Tensor, "position d"]], Float[Tensor, "position d"] | None]
"""Maps the values at replaced positions to others, in float32; None leaves them."""


@dataclass(frozen=True)
class PromptBatch:
    """Prompts padded at the right to one length, and where values may be replaced."""

    tokens: Int[Tensor, "batch pos"]
    is_token: Bool[Tensor, "batch pos"]
    is_replaced: Bool[Tensor, "batch pos"]


@dataclass(frozen=True)
class SpliceFigures:
    """Cross-entropies and KL in nats a token."""

    ce_clean: float
    ce_sae: float
    ce_zero: float
    kl: float = math.nan

    @property
    def ce_recovered(self) -> float:
        """(zero - sae) / (zero - clean); NaN if zero-ablation changes nothing."""
        gap = self.ce_zero - self.ce_clean
        return (self.ce_zero - self.ce_sae) / gap if gap else math.nan


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
def splice_figures(model: Model, sae: SAE, batches: Iterable[PromptBatch], ce_zero: float) -> SpliceFigures:
    """Return the figures of an SAE in its model; `ce_zero` is the loss with its hook points at zero (`zero_loss`)."""
    clean, spliced, divergence = _Mean(model), _Mean(model), _Mean(model)
    for batch in batches:
        tokens, is_replaced = batch.tokens.to(model.device), batch.is_replaced.to(model.device)
        log_probs = _log_probs(model.logits(tokens), batch)
        clean.add(_losses(log_probs, batch))
        for logits in _spliced(model, sae, tokens, is_replaced):
            made = _log_probs(logits, batch)
            spliced.add(_losses(made, batch))
            divergence.add(functional.kl_div(made, log_probs, log_target=True, reduction="none").sum(-1))
    return SpliceFigures(clean.value, spliced.value, ce_zero, divergence.value)


@torch.no_grad()
def cross_entropy(
    model: Model, hook: str, batches: Iterable[PromptBatch], replacement: Replacement | None = None
) -> float:
    """Return the mean cross-entropy of the next token over all tokens that have one, in nats.

    `replacement` maps the values at replaced positions, (position, d_in) float32, to others; None leaves the
    model alone.
    """
    mean = _Mean(model)
    for batch in batches:
        tokens, is_replaced = batch.tokens.to(model.device), batch.is_replaced.to(model.device)
        edits = {} if replacement is None else {hook: replacement}
        mean.add(_losses(_log_probs(_edited_logits(model, tokens, is_replaced, edits), batch), batch))
    return mean.value


class _Mean:
    """A running mean over tokens."""

    def __init__(self, model: Model) -> None:
        self._total = torch.zeros((), dtype=wide_dtype(model.device), device=model.device)
        self._n = 0

    def add(self, values: Float[Tensor, " token"]) -> None:
        self._total += values.sum(dtype=self._total.dtype)
        self._n += values.shape[0]

    @property
    def value(self) -> float:
        return float(self._total) / self._n


def _log_probs(logits: Float[Tensor, "batch pos d_vocab"], batch: PromptBatch) -> Float[Tensor, "token d_vocab"]:
    """Return the next token's log-probabilities at all positions that have a next token."""
    return logits[:, :-1][batch.is_token[:, 1:].to(logits.device)].float().log_softmax(-1)


def _losses(log_probs: Float[Tensor, "token d_vocab"], batch: PromptBatch) -> Float[Tensor, " token"]:
    targets = batch.tokens[:, 1:][batch.is_token[:, 1:]].to(log_probs.device)
    return -log_probs.gather(1, targets[:, None]).squeeze(1)


def _spliced(
    model: Model, sae: SAE, tokens: Int[Tensor, "batch pos"], is_replaced: Bool[Tensor, "batch pos"]
) -> Iterator[Float[Tensor, "batch pos d_vocab"]]:
    """Yield the logits with each of the SAE's outputs replaced."""
    sites = sae.sites
    if sites.kind == "sae":
        yield _edited_logits(model, tokens, is_replaced, {sites.inputs[0]: sae})
        return
    seen: dict[str, Tensor] = {}

    def remember(hook: str) -> Replacement:
        return lambda value: seen.__setitem__(hook, value)

    def made(hook: str) -> Tensor:
        return sae.by_output(sae(torch.cat([seen[name] for name in sites.inputs], dim=-1)))[hook]

    watched = {hook: remember(hook) for hook in sites.inputs}
    if sites.kind == "transcoder":
        out = sites.outputs[0]
        yield _edited_logits(model, tokens, is_replaced, {**watched, out: lambda _value: made(out)})
        return
    _edited_logits(model, tokens, is_replaced, watched)
    for out in sites.outputs:
        replacement = made(out)
        yield _edited_logits(model, tokens, is_replaced, {out: lambda _value, new=replacement: new})


def _edited_logits(
    model: Model,
    tokens: Int[Tensor, "batch pos"],
    is_replaced: Bool[Tensor, "batch pos"],
    replacements: dict[str, Replacement],
) -> Float[Tensor, "batch pos d_vocab"]:
    """Run the model with the values at some positions of its hook points replaced."""

    def edit_of(replacement: Replacement) -> Callable[..., Tensor | None]:
        def edit(value: Tensor, **_: object) -> Tensor | None:
            flat = value.reshape(*tokens.shape, -1)
            new = replacement(flat[is_replaced].float())
            if new is None:
                return None
            flat = flat.clone()
            flat[is_replaced] = new.to(flat.dtype)
            return flat.reshape(value.shape)

        return edit

    edits = {hook: edit_of(replacement) for hook, replacement in replacements.items()}
    if any(model.hooks[hook].module_path is None for hook in edits):
        return model.bridge.run_with_hooks(tokens, fwd_hooks=list(edits.items()))
    with model.edited(edits):
        return model.logits(tokens)
