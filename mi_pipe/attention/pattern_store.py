"""Attention patterns of a task's prompts on disk: one Zarr group, one chunk a prompt, float16."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr
from jaxtyping import Float, Int

from mi_pipe.attention.watching import watch_patterns
from mi_pipe.models.model import Model

PATTERN_DIMS = ("prompt", "layer", "head", "query", "key")
NO_TOKEN = -1


def prompt_patterns(model: Model, tokens: Int[np.ndarray, " pos"]) -> Float[np.ndarray, "layer head query key"]:
    """Return all attention patterns of one prompt, float16."""
    info = model.info
    patterns = np.zeros((info.n_layers, info.n_heads, len(tokens), len(tokens)), np.float16)

    def keep(layer: int, pattern: torch.Tensor) -> None:
        patterns[layer] = pattern[0].to(torch.float16).cpu().numpy()

    watch_patterns(model, torch.from_numpy(tokens.astype(np.int64))[None], keep)
    return patterns


def write_patterns(
    path: Path,
    prompts: list[int],
    tokens: list[Int[np.ndarray, " pos"]],
    patterns: Iterable[Float[np.ndarray, "layer head query key"]],
    shape: tuple[int, int],
    attributes: dict[str, Any],
) -> None:
    """Write prompts' patterns, one after the other, to a new group; `shape` is (layers, heads).

    Beyond a prompt's length patterns are NaN and tokens -1.
    """
    longest = max(len(row) for row in tokens)
    group = zarr.open_group(path, mode="w", zarr_format=3, attributes=attributes)
    chunk = (1, *shape, longest, longest)
    array = group.create_array(
        "pattern",
        shape=(len(prompts), *chunk[1:]),
        chunks=chunk,
        dtype="float16",
        fill_value=float("nan"),
        dimension_names=PATTERN_DIMS,
    )
    for i, pattern in enumerate(patterns):
        padded = np.full(chunk[1:], np.nan, np.float16)
        padded[:, :, : pattern.shape[2], : pattern.shape[3]] = pattern
        array[i] = padded
    token_id = np.full((len(prompts), longest), NO_TOKEN, np.int32)
    for row, ids in zip(token_id, tokens, strict=True):
        row[: len(ids)] = ids
    group.create_array("token_id", data=token_id, dimension_names=("prompt", "pos"))
    group.create_array("prompt", data=np.asarray(prompts, np.int32), dimension_names=("prompt",))
