"""The two unpatched runs of a batch of pairs, and what a sweep needs of them.

A patch takes place in the base run and takes its values from the donor run: denoising patches clean values
into the corrupted run, noising corrupted values into the clean run. An ablation takes its values from elsewhere
(mi_pipe/patching/interventions.py); the two runs and their metrics stay what they are.
"""

import logging
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache

from mi_pipe.models.hook_points import layer_of
from mi_pipe.models.model import Model
from mi_pipe.patching.block_calls import KeysValues
from mi_pipe.patching.interventions import Ablation
from mi_pipe.patching.metrics import Direction, LogitDiff, Metric, PairInfo
from mi_pipe.patching.patterns import is_pattern, z_hook, z_of_patterns
from mi_pipe.patching.readout import read_logits
from mi_pipe.patching.recording import record
from mi_pipe.patching.sae_parts import SAEParts, plain_hooks
from mi_pipe.prompts.prompt_set import PairGroup

_log = logging.getLogger(__name__)
_KEPT = ("attn.hook_out", "mlp.hook_out", "hook_attn_out", "hook_mlp_out")
"""What a block's modules return in the base run, so that they need not be run again."""


@dataclass(frozen=True)
class PairRuns:
    """Base and donor run of pairs of one length, on the model's device."""

    tokens: Int[Tensor, "pair pos"]
    """The base prompts."""
    info: PairInfo
    """Answers and wrong tokens, and the clean logits where the metric needs all."""
    metric: Metric
    first_change: Int[Tensor, " pair"]
    """The first position where a donor value can differ from the base run's; n_pos where none can."""
    base_logits: Float[Tensor, "pair n"]
    """The model's own logits in the base run, as the metric is given them."""
    donor_logits: Float[Tensor, "pair n"]
    residuals: list[Float[Tensor, "pair pos d_model"]]
    """What enters each block in the base run, and what leaves the last."""
    base: dict[str, Float[Tensor, "pair pos width"]]
    """The base run's value at each hook point of the sweep, heads not split, of the modules around them, and of parts
    of SAEs."""
    donors: dict[str, Float[Tensor, "pair pos width"]]
    """The value that is put there."""
    keys_values: KeysValues | None
    """Keys and values of the base run, if the model keeps them."""
    saes: SAEParts | None = None
    """The SAEs of which features or errors are patched."""

    @property
    def n_pairs(self) -> int:
        """Number of pairs."""
        return self.tokens.shape[0]

    @property
    def n_pos(self) -> int:
        """Number of tokens of each prompt."""
        return self.tokens.shape[1]

    @property
    def choices(self) -> Int[Tensor, "pair choice"]:
        """The tokens whose logits a metric of few logits reads."""
        return self.info.choices

    @property
    def base_metric(self) -> Float[Tensor, " pair"]:
        """The metric of the base run."""
        return self.metric.values(self.base_logits, self.info)

    @property
    def donor_metric(self) -> Float[Tensor, " pair"]:
        """The metric of the donor run."""
        return self.metric.values(self.donor_logits, self.info)


@torch.no_grad()
def run_pairs(
    model: Model,
    group: PairGroup,
    direction: Direction,
    hooks: list[str],
    metric: Metric | None = None,
    ablation: Ablation | None = None,
    saes: SAEParts | None = None,
) -> PairRuns:
    """Run both prompts of every pair and keep what patching at `hooks` needs; the metric is logit_diff by default.

    `hooks` may name parts of `saes` (sae_parts), of which an `ablation` knows too.

    Memory: n_layers x n_pairs x n_pos x d_model values for the base run, and up to six times as much for each
    layer of `hooks`. Raises StageError for attention patterns that do not make up the heads' outputs.
    """
    metric = metric or LogitDiff()
    clean, corrupted = group.clean.to(model.device), group.corrupted.to(model.device)
    base, donor = (corrupted, clean) if direction == "denoising" else (clean, corrupted)
    plain = [hook for hook in hooks if not is_pattern(hook)]
    entries = [f"blocks.{layer}.hook_resid_pre" for layer in range(model.info.n_layers)] + ["ln_final.hook_in"]
    wanted = dict.fromkeys([*entries, *_kept(model, hooks), *plain_hooks(plain), *plain])
    base_logits, seen, keys_values = _base_run(model, base, list(wanted), saes)
    donor_logits, donors = record(model, donor, plain, saes)
    first_change = _first_change(base, donor)
    if ablation is not None and ablation.needs_tokens:
        donor = ablation.tokens(group).to(model.device)
        _, donors = record(model, donor, plain, saes)
        first_change = _first_change(base, donor)
    elif ablation is not None:
        ablation.prepare(model, plain)
        donors = {hook: ablation.values(model, group, hook, seen[hook]) for hook in plain}
        first_change = torch.zeros_like(first_change)
    if patterns := [hook for hook in hooks if is_pattern(hook)]:
        assert ablation is None or ablation.needs_tokens, "patterns are those of other runs"
        donors |= z_of_patterns(model, base, donor, patterns)
    return PairRuns(
        tokens=base,
        info=(info := _info(group, metric, donor_logits if direction == "denoising" else base_logits)),
        metric=metric,
        first_change=first_change,
        base_logits=read_logits(base_logits, info, metric.needs_all_logits),
        donor_logits=read_logits(donor_logits, info, metric.needs_all_logits),
        residuals=[seen[name] for name in entries],
        base=seen,
        donors=donors,
        keys_values=keys_values,
        saes=saes,
    )


def _base_run(
    model: Model, tokens: Int[Tensor, "pair pos"], hooks: list[str], saes: SAEParts | None
) -> tuple[Float[Tensor, "pair d_vocab"], dict[str, Tensor], KeysValues | None]:
    """Run the base prompts with a cache of keys and values; without where the model keeps other states (LFM2's do)."""
    cache = DynamicCache()
    try:
        logits, seen = record(model, tokens, hooks, saes, past_key_values=cache, use_cache=True)
    except (TypeError, ValueError, IndexError, AttributeError) as reason:
        _log.info("%s cannot be run with a plain cache: %s", model.info.architecture, reason)
        return *record(model, tokens, hooks, saes), None
    return logits, seen, KeysValues.of_cache(cache)


def _info(group: PairGroup, metric: Metric, clean_logits: Float[Tensor, "pair d_vocab"]) -> PairInfo:
    device = clean_logits.device
    answers, wrongs = (tokens[:, None].to(device) for tokens in (group.answer, group.wrong))
    return PairInfo(answers, wrongs, clean_logits if metric.needs_all_logits else None)


def _first_change(base: Int[Tensor, "pair pos"], donor: Int[Tensor, "pair pos"]) -> Int[Tensor, " pair"]:
    changed = base != donor
    return torch.where(changed.any(1), changed.int().argmax(1), base.shape[1])


def _kept(model: Model, hooks: list[str]) -> list[str]:
    """Return the hook points around those of the sweep whose base values spare their modules."""
    layers = sorted({layer for hook in hooks if (layer := layer_of(hook)) is not None})
    around = [f"blocks.{layer}.{name}" for layer in layers for name in _KEPT]
    around += [z_hook(hook) for hook in hooks if is_pattern(hook)]
    return [name for name in around if name in model.hooks and model.hooks[name].module_path is not None]
