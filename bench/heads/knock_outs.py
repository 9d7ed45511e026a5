"""The heads of a class exchanged together, so that none can stand in for another; beside random heads of their layers.

At the place where a class acts (`end`, S2, or everywhere) z of all its heads becomes what it is on the corrupted
prompts. One head exchanged alone may seem idle because later heads make up for it; the class together shows it.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from bench.heads.agreement import Measure
from bench.heads.comparisons import members
from bench.heads.runs import Runs
from mi_pipe.heads.inhibition import Head
from mi_pipe.models.model import Edit, Model, as_logits
from mi_pipe.models.source import load_source
from mi_pipe.patching.chunks import choose_pairs
from mi_pipe.patching.places import places_mask
from mi_pipe.prompts.prompt_set import PairGroup

_DRAWS = 3
_PLACES = {
    "name_mover": "end",
    "negative_name_mover": "end",
    "subject_suppressor": "end",
    "subject_inhibition": "end",
    "duplicate_token": "s2",
    "induction": "s2",
}


def together(runs: Runs) -> str:
    """Return a table of the fall of the logit difference, class by class."""
    scores, model = runs.heads(), load_source(runs.model, runs.device)
    groups = [Exchange(model, group) for group in choose_pairs(runs.ioi.pair_groups(), runs.sizes.n_pairs)]
    lines = ["| class | heads | exchanged at | fall together | as many random heads |", "|---|---|---|---|---|"]
    for name, place in _PLACES.items():
        heads = members(scores, name)
        if not heads:
            continue
        fall = Measure.of_pairs("", falls(groups, heads, place)[:, None, None])
        draws = [falls(groups, drawn, place).mean() for drawn in _random(heads, runs.info.n_heads)]
        named = ", ".join(f"{layer}.{head}" for layer, head in heads)
        lines.append(f"| {name} | {named} | {place} | {fall.shown(0)} | {min(draws):.2f} to {max(draws):.2f} |")
    return "\n".join(lines)


def falls(groups: Sequence["Exchange"], heads: Sequence[Head], place: str) -> np.ndarray:
    """Return by how much each pair's logit difference falls with the heads exchanged at a place."""
    return np.concatenate([group.fall(heads, place) for group in groups])


class Exchange:
    """Pairs of one length: z of every head on their corrupted prompts, and the clean logit difference."""

    def __init__(self, model: Model, group: PairGroup) -> None:
        """Run both prompts once."""
        self.model, self.group = model, group
        self.donors: list[Tensor] = []
        names = [_z(layer) for layer in range(model.info.n_layers)]
        self._logit_diff(group.corrupted, dict.fromkeys(names, self._keep))
        self.clean = self._logit_diff(group.clean, {})

    def fall(self, heads: Sequence[Head], place: str) -> np.ndarray:
        """Return the fall of each pair's logit difference."""
        mask = torch.from_numpy(places_mask(self.group, [place]))
        by_layer: dict[int, list[int]] = {}
        for layer, head in heads:
            by_layer.setdefault(layer, []).append(head)
        edits = {_z(layer): self._edit(layer, chosen, mask) for layer, chosen in by_layer.items()}
        return (self.clean - self._logit_diff(self.group.clean, edits)).double().cpu().numpy()

    def _keep(self, value: Tensor) -> None:
        self.donors.append(value.clone())

    def _edit(self, layer: int, heads: list[int], mask: Tensor) -> Edit:
        def edit(value: Tensor) -> Tensor:
            changed = value.clone()
            shape = (*value.shape[:2], self.model.info.n_heads, -1)
            for head in heads:
                changed.view(shape)[:, :, head][mask] = self.donors[layer].view(shape)[:, :, head][mask]
            return changed

        return edit

    @torch.no_grad()
    def _logit_diff(self, tokens: Tensor, edits: Mapping[str, Edit]) -> Tensor:
        rows = torch.arange(self.group.n_pairs)
        with self.model.edited({**edits, "unembed.hook_in": lambda value: value[:, -1:]}):
            logits = as_logits(self.model.module(tokens.to(self.model.device)))[:, -1]
        return logits[rows, self.group.answer] - logits[rows, self.group.wrong]


def _z(layer: int) -> str:
    return f"blocks.{layer}.attn.hook_z"


def _random(heads: Sequence[Head], n_heads: int) -> list[list[Head]]:
    """Return draws of as many other heads from each of the layers."""
    random = np.random.default_rng(0)
    draws: list[list[Head]] = []
    for _ in range(_DRAWS):
        drawn: list[Head] = []
        for layer in sorted({layer for layer, _ in heads}):
            own = [head for a, head in heads if a == layer]
            others = [head for head in range(n_heads) if head not in own]
            chosen = random.choice(others, min(len(own), len(others)), replace=False)
            drawn += [(layer, int(head)) for head in chosen]
        draws.append(drawn)
    return draws
