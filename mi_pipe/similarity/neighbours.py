"""Mutual nearest neighbours: how far two representations agree on which rows are alike.

For each row its k nearest other rows by cosine are found in either representation; the value is the mean share that
both have in common, |N_k(x_i) ∩ N_k(y_i)| / k (Huh, Cheung, Wang and Isola 2024, on normalised features). Rows that
have nothing to do with each other share k / (n - 1). Unlike CKA it looks at small distances alone, and it depends on n:
values are compared at equal n and k.

Rows are a random sample, since all distances are computed: n² d operations a hook point. Held are one hook point's
rows, a block of distances, and k neighbours a row and hook point. Equally near rows (the same token at an embedding)
are taken in one random order that is the same for all hook points.
"""

import numpy as np
import xarray as xr
from jaxtyping import Float, Int

from mi_pipe.activations.store import ActivationStore
from mi_pipe.core.errors import ConfigError
from mi_pipe.similarity.nearest import nearest, overlap
from mi_pipe.similarity.prompt_intervals import mean_and_interval, prompt_clusters
from mi_pipe.similarity.sides import Side, compared_sides

Neighbours = dict[str, Int[np.ndarray, "row k"]]


def mutual_neighbours(
    store: ActivationStore,
    other: ActivationStore | None = None,
    *,
    hooks: str | list[str] | None = None,
    other_hooks: str | list[str] | None = None,
    where: str | None = None,
    with_massive: bool = False,
    k: int = 10,
    n_rows: int = 2048,
    centred: bool = True,
    other_prompts_only: bool = False,
    seed: int = 0,
) -> xr.Dataset:
    """Return `overlap`, and its 95% bootstrap interval over prompts `low` to `high`, as (hook, other_hook).

    `compared_sides` says what `hooks`, `other_hooks`, `where` and `with_massive` mean; of the rows that it chooses
    `n_rows` are drawn with `seed` (all, if there are no more). `centred` takes their mean away first; with
    `other_prompts_only` rows of the same prompt are no neighbours. The attribute `chance` is the overlap of unrelated
    rows. Raises ConfigError as `compared_sides` does, and for too few rows for `k`.
    """
    if n_rows < 1:
        raise ConfigError(f"n_rows is {n_rows}; it has to be at least 1.")
    sides = compared_sides(store, other, hooks, other_hooks, where, with_massive)
    rng = np.random.default_rng(seed)
    chosen = np.sort(rng.permutation(len(sides[0].rows))[:n_rows])
    first_side, second_side = sides[0].at(chosen), sides[1].at(chosen)
    order = rng.permutation(len(chosen))
    groups = first_side.prompts if other_prompts_only else np.arange(len(chosen))
    n_candidates = _n_candidates(groups, k)
    first = _neighbours(first_side, first_side.hooks, k, centred, order, groups)
    known = first if first_side.store is second_side.store else {}
    missing = [hook for hook in second_side.hooks if hook not in known]
    second = known | _neighbours(second_side, missing, k, centred, order, groups)
    figures = _overlaps(first, [second[hook] for hook in second_side.hooks], first_side.prompts, seed)
    dims = ("hook", "other_hook")
    attributes = {"store": store.id, "other_store": second_side.store.id, "where": where or "", "n_rows": len(chosen)}
    return xr.Dataset(
        {name: (dims, values) for name, values in figures.items()},
        {"hook": first_side.hooks, "other_hook": second_side.hooks},
        {**attributes, "k": k, "chance": float((k / n_candidates).mean())},
    )


def _n_candidates(groups: Int[np.ndarray, " row"], k: int) -> Int[np.ndarray, " row"]:
    """Return how many rows of other groups there are for each row; raises ConfigError if they are too few."""
    _, which, counts = np.unique(groups, return_inverse=True, return_counts=True)
    n_candidates = len(groups) - counts[which]
    if not 0 < k <= n_candidates.min():
        raise ConfigError(f"k is {k}; it has to be at least 1, and there are {n_candidates.min()} rows to choose from.")
    return n_candidates


def _neighbours(
    side: Side,
    hooks: list[str],
    k: int,
    centred: bool,
    order: Int[np.ndarray, " row"],
    groups: Int[np.ndarray, " row"],
) -> Neighbours:
    """Return the neighbours at each hook point, one at a time in memory."""
    found: Neighbours = {}
    for hook in hooks:
        values = side.read(hook)
        found[hook] = nearest(values - values.mean(0) if centred else values, k, order, groups)
    return found


def _overlaps(
    first: Neighbours, second: list[Int[np.ndarray, "row k"]], prompts: Int[np.ndarray, " row"], seed: int
) -> dict[str, Float[np.ndarray, "hook other_hook"]]:
    clusters, n_clusters = prompt_clusters(prompts)
    sums = np.zeros((n_clusters, len(first), len(second)))
    for i, own in enumerate(first.values()):
        for j, theirs in enumerate(second):
            sums[:, i, j] = np.bincount(clusters, overlap(own, theirs), n_clusters)
    found = mean_and_interval(sums, np.bincount(clusters, minlength=n_clusters), seed)
    return dict(zip(("overlap", "low", "high"), found, strict=True))
