"""How far the same row points the same way at two hook points: the mean over rows of the cosine.

Unlike CKA it asks for the same directions, not for the same geometry: of the residual stream, how much of a row stays
from layer to layer. Rows are read once; held are the sums of at most 512 groups of consecutive prompts, from which the
95% bootstrap interval over prompts is had.
"""

import numpy as np
import xarray as xr
from jaxtyping import Float

from mi_pipe.activations.store import ActivationStore
from mi_pipe.similarity.prompt_intervals import mean_and_interval, prompt_clusters
from mi_pipe.similarity.sides import Side, blocks, compared_sides
from mi_pipe.similarity.token_means import common_width


def layer_cosine(
    store: ActivationStore,
    *,
    hooks: str | list[str] | None = None,
    where: str | None = None,
    centred: bool = True,
    with_massive: bool = False,
    seed: int = 0,
) -> xr.Dataset:
    """Return `cosine`, and its interval `low` to `high`, of a row's values at each two hook points (hook, other_hook).

    Means over the rows that `where` picks, as `compared_sides` chooses them; `centred` takes each hook point's stored
    mean away first. Raises ConfigError for hook points of several widths, or if no row is left.
    """
    side, _ = compared_sides(store, None, hooks, None, where, with_massive)
    common_width(store, side.hooks)
    means = [store.statistics(hook).mean if centred else np.zeros(1) for hook in side.hooks]
    clusters, n_clusters = prompt_clusters(side.prompts)
    sums = np.zeros((n_clusters, len(side.hooks), len(side.hooks)))
    for rows in blocks(len(side.rows)):
        unit = _unit_rows(side, rows, means)
        values = np.matmul(unit, unit.transpose(0, 2, 1))
        np.add.at(sums, clusters[rows], values)
    counts = np.bincount(clusters, minlength=n_clusters)
    cosine, low, high = mean_and_interval(sums, counts, seed)
    dims = ("hook", "other_hook")
    return xr.Dataset(
        {"cosine": (dims, cosine), "low": (dims, low), "high": (dims, high)},
        dict.fromkeys(dims, side.hooks),
        {"store": store.id, "n_rows": len(side.rows), "where": where or "", "centred": int(centred)},
    )


def _unit_rows(side: Side, rows: slice, means: list[Float[np.ndarray, " d"]]) -> Float[np.ndarray, "row hook d"]:
    values = [side.read(hook, rows.start, rows.stop) - mean for hook, mean in zip(side.hooks, means, strict=True)]
    stacked = np.stack(values, axis=1).astype(np.float32)
    norms = np.sqrt(np.einsum("rhd,rhd->rh", stacked, stacked))[..., None]
    return np.divide(stacked, norms, out=np.zeros_like(stacked), where=norms > 0)
