"""The attention viewer: every head's pattern on some prompts of each task, loaded layer by layer.

A data script holds one layer of one prompt: for each head the lower triangle of its pattern, row by row, as 16-bit
integers (0 is no attention, 65535 all of it) in base64, little end first.
"""

import base64
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from mi_pipe.attention.head_scores import HeadScores
from mi_pipe.report.figures import Figure
from mi_pipe.report.heatmaps import colour_stops, heatmap
from mi_pipe.report.html import slug
from mi_pipe.report.page import Page

_FULL = 65535


def page(artifacts: Sequence[HeadScores], n_prompts: int) -> Page:
    """Make the viewer with at most `n_prompts` prompts of each task."""
    tasks = [(artifact, task) for artifact in artifacts for task in artifact.tasks]
    return Page(
        context={"view": {"tasks": [_task(*task, n_prompts) for task in tasks], **colour_stops(diverging=False)}},
        figures=[_distances(artifact, task, n_prompts) for artifact, task in tasks],
        scripts=_scripts(tasks, n_prompts),
    )


def packed(pattern: Float[np.ndarray, "head query key"]) -> list[str]:
    """Return each head's lower triangle as base64 of 16-bit integers; NaN counts as no attention."""
    lower = np.tril_indices(pattern.shape[-1])
    levels = np.rint(np.nan_to_num(pattern.astype(np.float64)) * _FULL).clip(0, _FULL).astype("<u2")
    return [base64.b64encode(head[lower].tobytes()).decode("ascii") for head in levels]


def mean_distance(pattern: Float[np.ndarray, "layer head query key"]) -> Float[np.ndarray, "layer head"]:
    """Return sum over keys of attention * (query - key), mean over the prompt's queries but the first.

    The first has no choice: it is left out as in the stage's own `mean_distance`.
    """
    n_pos = pattern.shape[-1]
    back = np.arange(n_pos)[:, None] - np.arange(n_pos)[None, :]
    of_query = np.nansum(pattern * back, axis=-1)
    is_query = np.isfinite(pattern[..., 0])[..., 1:]
    return np.where(is_query, of_query[..., 1:], 0.0).sum(-1) / np.maximum(is_query.sum(-1), 1)


def _key(artifact: HeadScores, task: str) -> str:
    return f"attention/{slug(artifact.id)}/{slug(task)}"


def _task(artifact: HeadScores, task: str, n_prompts: int) -> dict[str, Any]:
    pattern = artifact.pattern(task)
    return {
        "name": task,
        "key": _key(artifact, task),
        "n_layers": pattern.sizes["layer"],
        "n_heads": pattern.sizes["head"],
        "prompts": [list(map(str, labels)) for labels in pattern.attrs["labels"][:n_prompts]],
    }


def _scripts(tasks: Sequence[tuple[HeadScores, str]], n_prompts: int) -> Iterator[tuple[str, Any]]:
    for artifact, task in tasks:
        pattern = artifact.pattern(task)
        for i, labels in enumerate(pattern.attrs["labels"][:n_prompts]):
            of_prompt = pattern[i, :, :, : len(labels), : len(labels)].to_numpy()
            for layer, of_layer in enumerate(of_prompt):
                yield f"{_key(artifact, task)}/p{i}-{layer}", packed(of_layer)


def _distances(artifact: HeadScores, task: str, n_prompts: int) -> Figure:
    """Draw how far back each head looks, mean over prompts."""
    pattern = artifact.pattern(task)
    n_shown = min(pattern.sizes["prompt"], n_prompts)
    found = [mean_distance(pattern[i].to_numpy().astype(np.float64)) for i in range(n_shown)]
    distances = np.mean(found, axis=0)
    return heatmap(
        f"distance-{slug(task)}-{slug(artifact.id)}",
        f"How far back heads look: {task}",
        f"Heatmap of the mean attended distance of each head over {n_shown} prompts of {task}.",
        distances,
        [str(layer) for layer in range(distances.shape[0])],
        [str(head) for head in range(distances.shape[1])],
        row_title="layer",
        column_title="head",
        value_title="mean distance (tokens)",
        low=0.0,
    )
