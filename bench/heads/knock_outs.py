"""The heads of a class exchanged together, so that none can stand in for another; beside random heads of no class.

At the place where a class acts (`end` or S2) z of all its heads becomes what it is on the corrupted prompts, and so
with as many heads of no class from the same layers. One head exchanged alone may seem idle because later heads make up
for it; the class together shows it, and so does a head exchanged with those that make up for it held.
"""

from collections.abc import Collection, Mapping, Sequence

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
    """Return a table of the fall of the logit difference by class, and one of name movers with what follows held."""
    scores, model = runs.heads(), load_source(runs.model, runs.device)
    groups = [Exchange(model, group) for group in choose_pairs(runs.ioi.pair_groups(), runs.sizes.n_pairs)]
    classes = {name: members(scores, name) for name in scores.criteria}
    classed = [head for heads in classes.values() for head in heads]
    lines = ["| class | heads | exchanged at | fall together | as many random heads |", "|---|---|---|---|---|"]
    for name, place in _PLACES.items():
        if not (heads := classes[name]):
            continue
        fall = _mean(falls(groups, heads, place))
        draws = [falls(groups, drawn, place).mean() for drawn in _random(heads, classed, runs.info.n_heads)]
        lines.append(f"| {name} | {_named(heads)} | {place} | {fall} | {min(draws):.2f} to {max(draws):.2f} |")
    return "\n".join([*lines, "", *_repaired(groups, classes["name_mover"], classes["negative_name_mover"])])


def falls(groups: Sequence["Exchange"], heads: Sequence[Head], place: str, held: Sequence[Head] = ()) -> np.ndarray:
    """Return by how much each pair's logit difference falls with the heads exchanged at a place."""
    return np.concatenate([group.fall(heads, place, held) for group in groups])


def _repaired(groups: Sequence["Exchange"], movers: Sequence[Head], negative: Sequence[Head]) -> list[str]:
    """Return the lines of the second table; none without negative name movers in later layers."""
    if not movers or not negative:
        return []
    lines = [f"| name movers exchanged at end | fall | fall, {_named(negative)} held |", "|---|---|---|"]
    for heads in (*([head] for head in movers), movers):
        cells = [_mean(falls(groups, heads, "end", held)) for held in ((), negative)]
        lines.append(f"| {_named(heads)} | {cells[0]} | {cells[1]} |")
    return lines


def _mean(values: np.ndarray) -> str:
    return Measure.of_pairs("", values[:, None, None]).shown(0)


def _named(heads: Sequence[Head]) -> str:
    return ", ".join(f"{layer}.{head}" for layer, head in heads)


class Exchange:
    """Pairs of one length: z of every head on both prompts, and the clean logit difference."""

    def __init__(self, model: Model, group: PairGroup) -> None:
        """Run both prompts once."""
        self.model, self.group = model, group
        self.corrupted_z, _ = self._run(group.corrupted)
        self.clean_z, self.clean = self._run(group.clean)

    def fall(self, heads: Sequence[Head], place: str, held: Sequence[Head] = ()) -> np.ndarray:
        """Return the fall of each pair's logit difference; heads that are `held` keep their clean z at the place."""
        mask = torch.from_numpy(places_mask(self.group, [place]))
        sources = [(head, self.corrupted_z) for head in heads] + [(head, self.clean_z) for head in held]
        by_layer: dict[int, list[tuple[int, Tensor]]] = {}
        for (layer, head), z in sources:
            by_layer.setdefault(layer, []).append((head, z[layer]))
        edits = {_z(layer): self._edit(given, mask) for layer, given in by_layer.items()}
        return (self.clean - self._logit_diff(self.group.clean, edits)).double().cpu().numpy()

    def _edit(self, given: list[tuple[int, Tensor]], mask: Tensor) -> Edit:
        def edit(value: Tensor) -> Tensor:
            changed = value.clone()
            shape = (*value.shape[:2], self.model.info.n_heads, -1)
            for head, z in given:
                changed.view(shape)[:, :, head][mask] = z.view(shape)[:, :, head][mask]
            return changed

        return edit

    def _run(self, tokens: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return z of every layer, and the logit differences."""
        seen: list[Tensor] = []

        def keep(value: Tensor) -> None:
            seen.append(value.clone())

        names = [_z(layer) for layer in range(self.model.info.n_layers)]
        return seen, self._logit_diff(tokens, dict.fromkeys(names, keep))

    @torch.no_grad()
    def _logit_diff(self, tokens: Tensor, edits: Mapping[str, Edit]) -> Tensor:
        rows = torch.arange(self.group.n_pairs)
        with self.model.edited({**edits, "unembed.hook_in": lambda value: value[:, -1:]}):
            logits = as_logits(self.model.module(tokens.to(self.model.device)))[:, -1]
        return logits[rows, self.group.answer] - logits[rows, self.group.wrong]


def _z(layer: int) -> str:
    return f"blocks.{layer}.attn.hook_z"


def _random(heads: Sequence[Head], classed: Collection[Head], n_heads: int) -> list[list[Head]]:
    """Return draws of as many heads of no class from each of the layers."""
    random = np.random.default_rng(0)
    draws: list[list[Head]] = []
    for _ in range(_DRAWS):
        drawn: list[Head] = []
        for layer in sorted({layer for layer, _ in heads}):
            n_own = sum(a == layer for a, _ in heads)
            others = [head for head in range(n_heads) if (layer, head) not in classed]
            chosen = random.choice(others, min(n_own, len(others)), replace=False)
            drawn += [(layer, int(head)) for head in chosen]
        draws.append(drawn)
    return draws
