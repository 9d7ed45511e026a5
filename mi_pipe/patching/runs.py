"""The two unpatched runs of a batch of pairs, and what a sweep needs of them.

A patch takes place in the base run and takes its values from the donor run: denoising patches clean values
into the corrupted run, noising corrupted values into the clean run.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache

from mi_pipe.models.model import Model
from mi_pipe.patching.block_calls import KeysValues
from mi_pipe.patching.metrics import Direction
from mi_pipe.patching.readout import choice_diff, last_logits
from mi_pipe.prompts.prompt_set import PairGroup


@dataclass(frozen=True)
class PairRuns:
    """Base and donor run of pairs of one length, on the model's device."""

    tokens: Int[Tensor, "pair pos"]
    """The base prompts."""
    choices: Int[Tensor, "pair 2"]
    """The answer and the wrong token of each pair."""
    first_change: Int[Tensor, " pair"]
    """The first position where the two prompts differ; n_pos where they never do."""
    base_logits: Float[Tensor, "pair 2"]
    """The model's own logits of `choices` in the base run."""
    donor_logits: Float[Tensor, "pair 2"]
    residuals: list[Float[Tensor, "pair pos d_model"]]
    """What enters each block in the base run."""
    donors: dict[str, Float[Tensor, "pair pos width"]]
    """The donor run's value at each hook point of the sweep, heads not split."""
    keys_values: KeysValues | None
    """Keys and values of the base run, if the model keeps them."""

    @property
    def n_pairs(self) -> int:
        """Number of pairs."""
        return self.tokens.shape[0]

    @property
    def n_pos(self) -> int:
        """Number of tokens of each prompt."""
        return self.tokens.shape[1]

    @property
    def base_metric(self) -> Float[Tensor, " pair"]:
        """The logit difference of the base run."""
        return choice_diff(self.base_logits)

    @property
    def donor_metric(self) -> Float[Tensor, " pair"]:
        """The logit difference of the donor run."""
        return choice_diff(self.donor_logits)


@torch.no_grad()
def run_pairs(model: Model, group: PairGroup, direction: Direction, hooks: list[str]) -> PairRuns:
    """Run both prompts of every pair and keep what patching at `hooks` needs.

    Memory: n_layers x n_pairs x n_pos x d_model values for the base run, and as much for each layer's hook.
    """
    clean, corrupted = group.clean.to(model.device), group.corrupted.to(model.device)
    base, donor = (corrupted, clean) if direction == "denoising" else (clean, corrupted)
    choices = torch.stack([group.answer, group.wrong], dim=1).to(model.device)
    entries = [f"blocks.{layer}.hook_resid_pre" for layer in range(model.info.n_layers)]
    cache = DynamicCache()
    base_logits, residuals = _record(model, base, choices, entries, past_key_values=cache, use_cache=True)
    donor_logits, donors = _record(model, donor, choices, hooks)
    changed = base != donor
    return PairRuns(
        tokens=base,
        choices=choices,
        first_change=torch.where(changed.any(1), changed.int().argmax(1), base.shape[1]),
        base_logits=base_logits,
        donor_logits=donor_logits,
        residuals=[residuals[name] for name in entries],
        donors=donors,
        keys_values=KeysValues.of_cache(cache),
    )


def _record(
    model: Model, tokens: Int[Tensor, "pair pos"], choices: Int[Tensor, "pair 2"], hooks: list[str], **options: Any
) -> tuple[Float[Tensor, "pair 2"], dict[str, Tensor]]:
    found: dict[str, Tensor] = {}

    def keep(name: str):
        def note(value: Tensor) -> None:
            found[name] = value.clone()

        return note

    with model.edited({name: keep(name) for name in hooks}):
        logits = last_logits(model, tokens, **options)
    return logits.gather(-1, choices), found
