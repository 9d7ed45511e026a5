"""One table of evidence for classifying heads: scores, and means over a task's prompts."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from jaxtyping import Float

from mi_pipe.heads.prompt_attention import AFTER_SUBJECT, HABITS

TASK_PLACES = ("io", "s1", "s2", "end")
_PAIRS_OF_PLACES = (("end", "io"), ("end", "s1"), ("end", "s2"), ("s2", "s1"), ("s2", AFTER_SUBJECT))


def prompts_evidence(habits: Sequence[Float[np.ndarray, "pair layer head habit"]]) -> dict[str, np.ndarray]:
    """Return what all tasks' prompts say of each head: mean attention to the token before, over tasks' means."""
    means = [of_task[..., HABITS.index("previous_token")].mean(0) for of_task in habits]
    return {"prompts_previous_token": np.mean(means, 0)} if means else {}


def place_evidence(
    places: Float[np.ndarray, "pair layer head from to"], names: Sequence[str]
) -> dict[str, Float[np.ndarray, "layer head"]]:
    """Return the mean attention between the places that classes ask for, as `end_to_io`.

    Pairs that lack it (NaN) are left out; NaN where all do.
    """
    found = {}
    for query, key in _PAIRS_OF_PLACES:
        cells = places[..., names.index(query), names.index(key)]
        is_there = np.isfinite(cells)
        n_pairs = is_there.sum(0)
        total = np.where(is_there, cells, 0).sum(0)
        found[f"{query}_to_{key}"] = np.where(n_pairs > 0, total / np.maximum(n_pairs, 1), np.nan)
    return found


def logit_share(
    contributions: Float[np.ndarray, "pair layer head"], logit_diff: Float[np.ndarray, " pair"]
) -> Float[np.ndarray, "layer head"]:
    """Return each head's mean contribution over the mean logit difference."""
    return contributions.mean(0) / abs(float(logit_diff.mean()))


def with_columns(table: pd.DataFrame, columns: Mapping[str, Float[np.ndarray, "layer head"]]) -> pd.DataFrame:
    """Return a table of heads (by layer, then head) with further columns, float32."""
    return table.assign(**{name: values.ravel().astype(np.float32) for name, values in columns.items()})
