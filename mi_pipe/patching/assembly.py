"""From the pieces of a sweep, chunk by chunk, to the arrays, the pair table and the main figures of the artifact."""

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import pandas as pd
from jaxtyping import Float, Int, Shaped

from mi_pipe.core.manifest import Scalar
from mi_pipe.patching.chunks import Chunk
from mi_pipe.patching.metrics import Direction, effect_fraction
from mi_pipe.prompts.prompt_set import PromptSet

NO_TOKEN = -1


def n_pairs_of(chunks: list[Chunk]) -> int:
    """Return the number of pairs of all chunks."""
    return sum(chunk.group.n_pairs for chunk in chunks)


def gather_values(
    chunks: list[Chunk],
    n_layers: int,
    measured: Iterable[int],
    sizes: tuple[int, ...],
    read: Callable[[Chunk, int], np.ndarray],
) -> Float[np.ndarray, "pair layer *axes"]:
    """Put together what `read(chunk, layer)` returns (pair, *axes) of the layers that were measured.

    NaN in the others, and where a pair has no such position.
    """
    whole = np.full((n_pairs_of(chunks), n_layers, *sizes), np.nan, np.float32)
    for layer in measured:
        for chunk in chunks:
            values = read(chunk, layer)
            # Positions are the last axis, and short prompts have fewer.
            there = tuple(slice(size) for size in values.shape[1:])
            whole[(chunk.rows, layer, *there)] = values
    return whole


def token_arrays(chunks: list[Chunk], n_pos: int) -> dict[str, Int[np.ndarray, "pair pos"]]:
    """Return the tokens of the clean and the corrupted prompts, -1 beyond a prompt's end."""
    arrays = {
        name: np.full((n_pairs_of(chunks), n_pos), NO_TOKEN, np.int32) for name in ("token_id", "corrupted_token_id")
    }
    for chunk in chunks:
        for array, tokens in zip(arrays.values(), (chunk.group.clean, chunk.group.corrupted), strict=True):
            array[chunk.rows, : chunk.group.n_pos] = tokens.numpy()
    return arrays


def token_texts(labels: Iterable[Sequence[str]], n_pos: int) -> Shaped[np.ndarray, "pair pos"]:
    """Return the text of every token of the clean prompts, "" beyond a prompt's end."""
    return np.array([[*texts, *[""] * (n_pos - len(texts))] for texts in labels], np.dtypes.StringDType())


def pair_table(
    chunks: list[Chunk],
    task: PromptSet,
    clean: Float[np.ndarray, " pair"],
    corrupted: Float[np.ndarray, " pair"],
    first_change: Int[np.ndarray, " pair"],
) -> pd.DataFrame:
    """Return the clean prompts' rows of the task, with both metrics, the first differing position and token texts."""
    pairs = np.concatenate([chunk.group.pairs for chunk in chunks])
    prompts = task.prompts[task.prompts["role"] == "clean"].set_index("pair").loc[pairs].reset_index()
    labels = [task.texts(int(i)) for i in prompts["prompt_idx"]]
    table = prompts.drop(columns=["prompt_idx", "role"]).rename(columns={"n_tokens": "n_pos"})
    return table.assign(clean=clean, corrupted=corrupted, first_change=first_change, labels=labels)


def main_figures(
    clean: Float[np.ndarray, " pair"],
    corrupted: Float[np.ndarray, " pair"],
    heads: Float[np.ndarray, "pair layer head"] | None,
    direction: Direction,
    metric: str,
) -> dict[str, Scalar]:
    """Return the metric of both runs, the share of clean prompts answered right, and the head that matters most.

    No head is named where the two runs do not differ.
    """
    figures: dict[str, Scalar] = {
        "n_pairs": len(clean),
        f"clean_{metric}": float(clean.mean()),
        f"corrupted_{metric}": float(corrupted.mean()),
    }
    if metric == "logit_diff":
        figures["clean_accuracy"] = float((clean > 0).mean())
    if heads is not None:
        fraction = effect_fraction(heads.mean(0), np.asarray(clean.mean()), np.asarray(corrupted.mean()), direction)
        if np.isfinite(fraction).any():
            layer, head = np.unravel_index(int(np.nan_to_num(np.abs(fraction)).argmax()), fraction.shape)
            figures |= {"strongest_head": f"{layer}.{head}", "strongest_head_fraction": float(fraction[layer, head])}
    return figures
