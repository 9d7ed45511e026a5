"""Where every head looks on task prompts: habits over all queries, and attention between the task's named places.

Habits, mean over the queries of a prompt: `attention_entropy` (nats), `first_token_share` and `mean_distance` (sum over
keys of attention * (query - key), in tokens), and `previous_token` (attention to the token before), the last three over
queries but the first, which has no choice.

Places are the positions that a task names (indirect objects: io, s1, s2, end), and s1+1, the token after s1, where
the subject's first mention can be matched by an induction head.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mi_pipe.attention.diagonals import diagonal_mean, pattern_entropy
from mi_pipe.attention.watching import watch_patterns
from mi_pipe.models.model import Model
from mi_pipe.patching.places import END, place_positions

HABITS = ("attention_entropy", "first_token_share", "mean_distance", "previous_token")
AFTER_SUBJECT = "s1+1"


@dataclass(frozen=True)
class PromptAttention:
    """What a batch of prompts gave, prompt by prompt, float32."""

    habits: Float[np.ndarray, "pair layer head habit"]
    places: Float[np.ndarray, "pair layer head from to"]
    """Attention from one named place to another; NaN where a prompt lacks either, or the key is after the query."""


def named_positions(places: Mapping[str, Int[np.ndarray, " pair"]], n_pos: int) -> dict[str, Int[np.ndarray, " pair"]]:
    """Return the positions (-1: none) of a group's named places by name, `end` last, with `s1+1` beside `s1`."""
    found = dict(places)
    if "s1" in found:
        lengths = np.full(len(found["s1"]), n_pos)
        found[AFTER_SUBJECT] = place_positions(found, lengths, AFTER_SUBJECT)
    return {name: found[name] for name in sorted(found, key=lambda name: (name == END, name))}


def measure_attention(
    model: Model, tokens: Int[Tensor, "pair pos"], places: Int[np.ndarray, "pair place"]
) -> PromptAttention:
    """Run prompts of one length, and return where every head looks."""
    n_pairs, n_places = places.shape
    shape = (n_pairs, model.info.n_layers, model.info.n_heads)
    habits = np.zeros((*shape, len(HABITS)), np.float32)
    between = np.zeros((*shape, n_places, n_places), np.float32)
    where = torch.from_numpy(places)

    def keep(layer: int, pattern: Float[Tensor, "batch head query key"]) -> None:
        habits[:, layer] = attention_habits(pattern).cpu().numpy()
        between[:, layer] = between_places(pattern, where.to(pattern.device)).float().cpu().numpy()

    watch_patterns(model, tokens, keep)
    return PromptAttention(habits, between)


def attention_habits(pattern: Float[Tensor, "batch head query key"]) -> Float[Tensor, "batch head habit"]:
    """Return HABITS of each prompt and head, float64; prompts have at least two tokens."""
    position = torch.arange(pattern.shape[-1], device=pattern.device, dtype=torch.float64)
    distance = (pattern.double() * (position[:, None] - position)).sum(-1)
    first = pattern[:, :, 1:, 0].double().mean(-1)
    return torch.stack(
        [pattern_entropy(pattern), first, distance[:, :, 1:].mean(-1), diagonal_mean(pattern, 1)], dim=-1
    )


def between_places(
    pattern: Float[Tensor, "batch head query key"], places: Int[Tensor, "batch place"]
) -> Float[Tensor, "batch head from to"]:
    """Return the attention from each place to each place that is not after it; NaN elsewhere."""
    rows = torch.arange(len(places), device=pattern.device)[:, None, None]
    known = places.clamp_min(0)
    # Advanced indices on both sides of the head axis put it last.
    found = pattern[rows, :, known[:, :, None], known[:, None, :]].permute(0, 3, 1, 2)
    query, key = places[:, :, None], places[:, None, :]
    is_there = (query >= 0) & (key >= 0) & (key <= query)
    return found.masked_fill(~is_there[:, None], torch.nan)
