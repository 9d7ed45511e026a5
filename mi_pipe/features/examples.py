"""Which rows to show for a feature: its strongest ones, and a uniform sample from each quantile.

Order of a feature's firings: activation descending, row ascending where activations are equal.

- Top: the first `n_top` of that order, at most one a prompt (its first), so that one odd prompt cannot fill it.
- Quantiles: the firings are cut into `n_quantiles` groups of equal size by rank; with n firings, the one of rank r
  from below belongs to group floor(r * n_quantiles / n), so q0 is the weakest. From each group come the
  `n_per_quantile` rows with the least value of mix(mix(mix(seed) + feature) + row), mix being SplitMix64 (Steele,
  Lea and Flood 2014): a uniform sample without replacement that is a function of (seed, feature, set of firings).

Both are functions of the set of firings alone; in which blocks or in what order they were found has no influence.
"""

import itertools
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float32, Int, Int8, Int32, Int64, UInt64

from mi_pipe.features.firings import Firings

TOP = 0
"""Group code of the top examples; quantile q has the code q + 1."""


@dataclass(frozen=True)
class Examples:
    """Chosen firings, sorted by feature, group and rank."""

    feature: Int32[np.ndarray, " example"]
    group: Int8[np.ndarray, " example"]
    rank: Int32[np.ndarray, " example"]
    """0 is the strongest of its group."""
    row: Int64[np.ndarray, " example"]
    activation: Float32[np.ndarray, " example"]

    @property
    def group_names(self) -> list[str]:
        """The group of each example in words: "top", or "q0", "q1" and so on."""
        return ["top" if code == TOP else f"q{code - 1}" for code in self.group]


def choose_examples(
    firings: Firings,
    prompt_of_row: Int[np.ndarray, " row"],
    n_top: int,
    n_quantiles: int,
    n_per_quantile: int,
    seed: int,
    wanted: Bool[np.ndarray, " feature"] | None = None,
) -> Examples:
    """Choose the examples of every feature, or of those `wanted` (indexed by feature from 0).

    `prompt_of_row` is indexed by the firings' rows.
    """
    chosen: list[np.ndarray] = []
    sizes: list[tuple[int, int, int]] = []
    for feature in range(firings.first_feature, firings.first_feature + firings.n_features):
        if wanted is not None and not wanted[feature]:
            continue
        own = firings.of(feature)
        row, activation = firings.row[own], firings.activation[own]
        order = strongest_first(activation)
        groups = [top_examples(order, prompt_of_row[row], n_top)]
        groups += quantile_samples(order, random_keys(seed, feature, row), n_quantiles, n_per_quantile)
        chosen += [group + own.start for group in groups]
        sizes += [(feature, code, len(group)) for code, group in enumerate(groups)]
    return _as_examples(firings, chosen, sizes)


def _as_examples(firings: Firings, chosen: list[np.ndarray], sizes: list[tuple[int, int, int]]) -> Examples:
    feature, code, n_chosen = np.array(sizes, np.int64).reshape(-1, 3).T
    place = np.concatenate([np.zeros(0, np.int64), *chosen])
    rank = np.concatenate([np.zeros(0, np.int32), *(np.arange(n, dtype=np.int32) for n in n_chosen)])
    return Examples(
        np.repeat(feature, n_chosen).astype(np.int32),
        np.repeat(code, n_chosen).astype(np.int8),
        rank,
        firings.row[place],
        firings.activation[place],
    )


def strongest_first(activation: Float32[np.ndarray, " firing"]) -> Int64[np.ndarray, " firing"]:
    """Return the order by activation descending, earlier rows first where equal.

    The bits of positive floats sort like integers, so one sort of 64-bit keys (bits, then place) does both.
    """
    n = len(activation)
    keys = activation.view(np.uint32).astype(np.uint64) << np.uint64(32)
    keys |= np.arange(n - 1, -1, -1, dtype=np.uint64)
    keys.sort()
    return n - 1 - (keys[::-1] & np.uint64(0xFFFFFFFF)).astype(np.int64)


def top_examples(
    order: Int64[np.ndarray, " firing"], prompt: Int[np.ndarray, " firing"], n_top: int
) -> Int64[np.ndarray, " chosen"]:
    """Return the first `n_top` of `order` that are the first of their prompt; looks no further than needed."""
    n_seen = min(4 * n_top, len(order))
    while True:
        first = np.sort(np.unique(prompt[order[:n_seen]], return_index=True)[1])
        if len(first) >= n_top or n_seen == len(order):
            return order[first[:n_top]]
        n_seen = min(4 * n_seen, len(order))


def quantile_samples(
    order: Int64[np.ndarray, " firing"],
    keys: UInt64[np.ndarray, " firing"],
    n_quantiles: int,
    n_per_quantile: int,
) -> list[Int64[np.ndarray, " chosen"]]:
    """Return for each quantile, weakest first, the firings with the least keys, strongest of them first."""
    n = len(order)
    cuts = [n - (-(-group * n // max(n_quantiles, 1))) for group in range(n_quantiles + 1)]
    groups = [order[below:above] for above, below in itertools.pairwise(cuts)]
    return [group[_least(keys[group], n_per_quantile)] for group in groups]


def _least(keys: np.ndarray, n_least: int) -> np.ndarray:
    """Return the places of the least keys, in ascending order of place."""
    if len(keys) <= n_least:
        return np.arange(len(keys))
    return np.sort(np.argpartition(keys, n_least)[:n_least])


def random_keys(seed: int, feature: int, row: Int[np.ndarray, " firing"]) -> UInt64[np.ndarray, " firing"]:
    """Return the sampling key of each row: mix(mix(mix(seed) + feature) + row) in 64-bit arithmetic."""
    start = np.array([seed % (1 << 64)], np.uint64)
    return _mix(_mix(_mix(start) + np.uint64(feature)) + row.astype(np.uint64))


def sampled_features(d_sae: int, n_features: int | None, seed: int) -> Bool[np.ndarray, " feature"]:
    """Say which features get examples: all, or the `n_features` with the least mix(mix(seed) + feature)."""
    chosen = np.ones(d_sae, bool)
    if n_features is not None and n_features < d_sae:
        start = _mix(np.array([seed % (1 << 64)], np.uint64))
        keys = _mix(start + np.arange(d_sae, dtype=np.uint64))
        chosen[np.argsort(keys)[n_features:]] = False
    return chosen


def _mix(value: np.ndarray) -> np.ndarray:
    """SplitMix64's next value: a bijection on 64-bit integers whose outputs look random."""
    value = value + np.uint64(0x9E3779B97F4A7C15)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
