"""What the comparison runs: the stage `heads` on one side, exact interventions by other stages on the other.

- `at_place`: stage `patch`, every head's z at `end` or at S2 exchanged for its value on the corrupted prompt;
- `copies`: stage `patch`, every head's z at `end` replaced by its mean by position, on repeated random tokens;
- `paths`: stage `attribute`, path patching from chosen heads into the logits alone, into the queries of name movers,
  and into the values of the heads that these are steered by;
- `matched`: how far the induction heads' own diagonal falls when an earlier head's z is replaced by its mean.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mi_pipe.attention.diagonals import diagonal_mean
from mi_pipe.attention.head_scores import HeadScores
from mi_pipe.attention.repeats import repeated_sequences
from mi_pipe.attention.watching import watch_patterns
from mi_pipe.attribution.attributions import Attributions
from mi_pipe.attribution.config import AttributionConfig, PathConfig, VerifyConfig
from mi_pipe.core.stage import execute
from mi_pipe.core.store import Store
from mi_pipe.heads.inhibition import Head
from mi_pipe.models.info import ModelInfo
from mi_pipe.models.model import Model
from mi_pipe.models.source import ModelSource, source_hooks
from mi_pipe.patching.effects import PatchEffects
from mi_pipe.patching.engine import SHORTCUTS
from mi_pipe.patching.interventions import Intervention
from mi_pipe.prompts.ioi import IOIConfig
from mi_pipe.prompts.prompt_set import PromptSet
from mi_pipe.prompts.repeated import InductionConfig
from stages import attribute, generate_prompts, heads, patch

_PERIOD = 10
_SEQUENCES = 2


@dataclass(frozen=True)
class Sizes:
    """How much is measured, and from which seed prompts and random tokens are."""

    seed: int = 0
    n_pairs: int = 32


class Runs:
    """The artifacts of one model and seed, made where they are not in the store."""

    def __init__(self, model: ModelSource, store: Store, sizes: Sizes, device: str) -> None:
        """Make the tasks' prompts."""
        self.model, self.store, self.sizes, self.device = model, store, sizes, device
        self.info: ModelInfo = source_hooks(model)[1]
        self.ioi = self._prompts(IOIConfig(n_pairs=sizes.n_pairs, seed=sizes.seed))
        # With the key replaced there is nothing to copy; means over such prompts hold no answer.
        self.repeated = self._prompts(
            InductionConfig(n_pairs=sizes.n_pairs, period=_PERIOD, corruption="key", seed=sizes.seed)
        )

    def heads(self) -> HeadScores:
        """Return the scores."""
        config = heads.HeadsConfig(seed=self.sizes.seed, max_pairs=self.sizes.n_pairs, device=self.device)
        return HeadScores(self._made(heads.STAGE, config, heads.Inputs(self.model, [self.ioi])))

    def at_place(self, place: str) -> PatchEffects:
        """Return the sweep over all heads at one place of the prompts."""
        return self._patched(self.ioi, "patch", place)

    def copies(self) -> PatchEffects:
        """Return the sweep over all heads on repeated random tokens."""
        return self._patched(self.repeated, "mean_by_position", "end")

    def paths(self, receivers: Sequence[str], heads: Sequence[Head]) -> Attributions:
        """Return path patching from these heads; MLPs are computed anew."""
        senders = tuple(f"a{layer}.h{head}" for layer, head in heads)
        config = AttributionConfig(
            kinds=["z"],
            direction="noising",
            max_pairs=self.sizes.n_pairs,
            verify=VerifyConfig(top=0, random=0),
            paths=(PathConfig(receivers=tuple(receivers), senders=senders),),
            device=self.device,
        )
        return Attributions(self._made(attribute.STAGE, config, attribute.Inputs(self.model, self.ioi)))

    def _patched(self, task: PromptSet, intervention: Intervention, place: str) -> PatchEffects:
        config = patch.PatchConfig(
            units=["head_out_by_pos"],
            direction="noising",
            intervention=intervention,
            positions=[place],
            max_pairs=self.sizes.n_pairs,
            device=self.device,
            shortcuts=list(SHORTCUTS),
        )
        return PatchEffects(self._made(patch.STAGE, config, patch.Inputs(self.model, task)))

    def _prompts(self, config: Any) -> PromptSet:
        return PromptSet(self._made(generate_prompts.STAGE, config, generate_prompts.Inputs(self.model)))

    def _made(self, stage: Any, config: Any, inputs: Any) -> Path:
        return execute(stage, config, inputs, self.store).artifact.path


@torch.no_grad()
def matched(
    model: Model, senders: Sequence[Head], receivers: Sequence[Head], seed: int, period: int = 15
) -> dict[Head, float]:
    """Return by how much receivers' induction diagonal falls without each sender: mean over receivers in later layers.

    The sender's z is replaced by its mean over all positions of the sequences.
    """
    tokens = repeated_sequences(model.vocabulary, model.info, _SEQUENCES, period, seed)
    whole = _diagonals(model, tokens, receivers, {})
    found = {}
    for layer, head in senders:
        edit = {f"blocks.{layer}.attn.hook_z": lambda z, head=head: _without(z, head, model.info.n_heads)}
        later = [i for i, (receiver_layer, _) in enumerate(receivers) if receiver_layer > layer]
        found[layer, head] = float((whole - _diagonals(model, tokens, receivers, edit))[later].mean())
    return found


def _without(z: Tensor, head: int, n_heads: int) -> Tensor:
    changed = z.clone()
    by_head = changed.view(*z.shape[:2], n_heads, -1)
    by_head[:, :, head] = by_head[:, :, head].mean((0, 1))
    return changed


def _diagonals(model: Model, tokens: Tensor, receivers: Sequence[Head], edits: dict[str, Any]) -> np.ndarray:
    found = np.zeros(len(receivers))
    lag = tokens.shape[1] // 2 - 1

    def keep(layer: int, pattern: Tensor) -> None:
        for i, (receiver_layer, head) in enumerate(receivers):
            if receiver_layer == layer:
                found[i] = diagonal_mean(pattern[:, [head]], lag).mean().item()

    watch_patterns(model, tokens, keep, edits)
    return found
