"""Whether a head moves the attention of name movers: their attention with that head's output exchanged at the end.

What an early head writes at the last position is replaced by what it writes there on the corrupted prompt, and the
attention that the receivers pay from `end` to `io` is measured again. A subject-inhibition head tells name movers not
to look at the subject, so without it they look at the indirect object less (Wang et al. 2022, section 3.2: there by
path patching to their queries; here everything between the head and the receivers is computed anew).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mi_pipe.attention.watching import watch_patterns
from mi_pipe.models.model import Edit, Model

Head = tuple[int, int]
"""Layer and head."""


@dataclass(frozen=True)
class InhibitionPrompts:
    """Clean and corrupted prompts of one length, and where the indirect object stands."""

    clean: Int[Tensor, "pair pos"]
    corrupted: Int[Tensor, "pair pos"]
    io: Int[Tensor, " pair"]


@torch.no_grad()
def attention_losses(
    model: Model, prompts: InhibitionPrompts, heads: Sequence[Head], receivers: Sequence[Head]
) -> Float[np.ndarray, "head pair"]:
    """Return by how much receivers' attention to `io` falls for each exchanged head: mean over receivers, float64.

    Receivers that are not in later layers than a head are left out for it; NaN if none is left.
    """
    donors = _last_z(model, prompts.corrupted)
    clean = _attention_to_io(model, prompts, receivers, {})
    losses = np.full((len(heads), len(prompts.clean)), np.nan)
    for row, (layer, head) in enumerate(heads):
        later = [i for i, (receiver_layer, _) in enumerate(receivers) if receiver_layer > layer]
        if later:
            edit = _exchange(donors[layer], head, model.info.n_heads)
            patched = _attention_to_io(model, prompts, receivers, {f"blocks.{layer}.attn.hook_z": edit})
            losses[row] = (clean - patched)[later].mean(0)
    return losses


def _attention_to_io(
    model: Model, prompts: InhibitionPrompts, receivers: Sequence[Head], edits: dict[str, Edit]
) -> Float[np.ndarray, "receiver pair"]:
    found = np.zeros((len(receivers), len(prompts.clean)))
    rows, io = torch.arange(len(prompts.clean), device=model.device), prompts.io.to(model.device)

    def keep(layer: int, pattern: Float[Tensor, "batch head query key"]) -> None:
        for i, (receiver_layer, head) in enumerate(receivers):
            if receiver_layer == layer:
                found[i] = pattern[rows, head, -1, io].double().cpu().numpy()

    watch_patterns(model, prompts.clean, keep, edits)
    return found


def _last_z(model: Model, tokens: Int[Tensor, "pair pos"]) -> list[Float[Tensor, "pair head_d_head"]]:
    seen: list[Tensor] = []

    def keep(value: Tensor) -> None:
        seen.append(value[:, -1].flatten(1))

    with model.edited({f"blocks.{layer}.attn.hook_z": keep for layer in range(model.info.n_layers)}):
        model.module(tokens.to(model.device))
    return seen


def _exchange(donor: Float[Tensor, "pair head_d_head"], head: int, n_heads: int) -> Edit:
    def edit(value: Tensor) -> Tensor:
        changed = value.clone()
        # The bridge gives z with heads split or flat; a view by head serves both.
        by_head = changed.view(*changed.shape[:2], n_heads, -1)
        by_head[:, -1, head] = donor.view(len(donor), n_heads, -1)[:, head].to(changed)
        return changed

    return edit
