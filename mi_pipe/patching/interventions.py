"""What is put in the place of a value: the other run's (patching), zeros, means, or another prompt's (ablations).

patch: the donor run of the same pair. zero: zeros. mean: the mean over all positions of all donor prompts of the task.
mean_by_position: the mean over the donor prompts of the same template and length, position by position (Wang et al.
2022 ablate so, over their ABC prompts). resample: the donor run of another pair of the same length, drawn with a seed.
Donor prompts are the corrupted ones when noising (the base run is clean), the clean ones when denoising, of all pairs
of the task, also of those that are not swept: a mean is the better the more it is of.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mi_pipe.models.model import Model
from mi_pipe.patching.metrics import Direction
from mi_pipe.patching.recording import record
from mi_pipe.patching.sae_parts import SAEParts
from mi_pipe.prompts.prompt_set import PairGroup

Intervention = Literal["patch", "zero", "mean", "mean_by_position", "resample"]
_PROMPTS_A_RUN = 16


def donor_groups(kind: Intervention, task: Sequence[PairGroup], swept: Sequence[PairGroup]) -> Sequence[PairGroup]:
    """Return the pairs whose donor prompts are used: all of the task, or the swept ones where each gets its own."""
    return swept if kind in ("patch", "zero") else task


def n_without_others(kind: Intervention, groups: Sequence[PairGroup], donors: Sequence[PairGroup]) -> int:
    """Return how many pairs have no other to take a mean with, or to draw from: they get their own donor's values."""
    if kind == "mean_by_position":
        counts = Counter((group.n_pos, template) for group in donors for template in group.templates)
        return sum(counts[group.n_pos, template] == 1 for group in groups for template in group.templates)
    counts = Counter({group.n_pos: group.n_pairs for group in donors})
    return sum(counts[group.n_pos] == 1 for group in groups) if kind == "resample" else 0


@dataclass
class Ablation:
    """Ablation values of a sweep."""

    kind: Intervention
    direction: Direction
    groups: Sequence[PairGroup]
    """The pairs that means are taken over and other pairs drawn from, those of the sweep among them."""
    seed: int = 0
    saes: SAEParts | None = None
    """The SAEs whose parts are ablated, if any are."""
    _sums: dict[tuple[str, str, int], tuple[Tensor, int]] = field(default_factory=dict)
    """Sum over prompts (pos, width) and their number, by hook point, template and length."""

    @property
    def needs_tokens(self) -> bool:
        """Whether values come from other prompts, run like a donor run."""
        return self.kind == "resample"

    def tokens(self, group: PairGroup) -> Int[Tensor, "pair pos"]:
        """Return another pair's donor prompt for each pair (its own, if it is alone of its length)."""
        whole = next(g for g in self.groups if g.n_pos == group.n_pos)
        n = whole.n_pairs
        # A shift by 1 to n - 1 places in a random order: no pair gets its own prompt.
        order = np.random.default_rng([self.seed, whole.n_pos]).permutation(n)
        drawn = np.empty(n, np.int64)
        drawn[order] = np.roll(order, 1)
        rows = drawn[np.searchsorted(whole.pairs, group.pairs)]
        return self._donor_prompts(whole)[torch.from_numpy(rows)]

    def values(
        self, model: Model, group: PairGroup, hook: str, base: Float[Tensor, "pair pos width"]
    ) -> Float[Tensor, "pair pos width"]:
        """Return what replaces the base run's value at a hook point."""
        if self.kind == "zero":
            return torch.zeros_like(base)
        if self.kind == "mean":
            total, n_tokens = self._total(model, hook)
            return (total / n_tokens).to(base.dtype).expand_as(base)
        means = [self._sum(model, hook, template, group.n_pos) for template in group.templates]
        return torch.stack([total / count for total, count in means]).to(base.dtype)

    def prepare(self, model: Model, hooks: list[str]) -> None:
        """Run the donor prompts of all groups once for the means at these hook points, where means are asked for."""
        if self.kind not in ("mean", "mean_by_position"):
            return
        missing = [hook for hook in hooks if not any(hook == known for known, _, _ in self._sums)]
        for group in self.groups if missing else ():
            prompts = self._donor_prompts(group)
            for start in range(0, group.n_pairs, _PROMPTS_A_RUN):
                rows = slice(start, start + _PROMPTS_A_RUN)
                _, seen = record(model, prompts[rows].to(model.device), missing, self.saes)
                self._add(seen, group.templates[rows])

    def _add(self, seen: dict[str, Tensor], templates: Sequence[str]) -> None:
        for hook, value in seen.items():
            for row, template in enumerate(templates):
                key = (hook, template, value.shape[1])
                total, count = self._sums.get(key, (torch.zeros_like(value[0], dtype=torch.float64), 0))
                self._sums[key] = (total + value[row].double(), count + 1)

    def _sum(self, model: Model, hook: str, template: str, n_pos: int) -> tuple[Tensor, int]:
        self.prepare(model, [hook])
        return self._sums[(hook, template, n_pos)]

    def _total(self, model: Model, hook: str) -> tuple[Tensor, int]:
        self.prepare(model, [hook])
        found = [(total, count) for (known, _, _), (total, count) in self._sums.items() if known == hook]
        return torch.stack([total.sum(0) for total, _ in found]).sum(0), sum(len(t) * n for t, n in found)

    def _donor_prompts(self, group: PairGroup) -> Int[Tensor, "pair pos"]:
        return group.clean if self.direction == "denoising" else group.corrupted
