"""Linear CKA between hook points: of one store, or of two stores of the same prompts.

    cka(acts)["cka"]                    # every hook point with every other
    cka(acts, other_acts)["cka"]        # of one model with those of another

Rows are read in their order: for the means, for the norms, and for products of centred rows (float32 within a block,
added up in float64). Held are one float64 matrix, width by width, for each pair of hook points, as many pairs at a time
as `memory_bytes` allows, each further set being one more pass, and a block of 1,024 rows of every hook point. `hsic.py`
has the formulas.

How much chance there is in a value is told by random groups of prompts (Wolter 2007, chapter 2): CKA is computed in
each, and the deviation between them, divided by the root of their number, is the standard error. Whole prompts, since
tokens of one prompt are not independent. The unbiased estimator makes groups comparable with the whole.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import xarray as xr
from jaxtyping import Float, Int

from mi_pipe.activations.store import ActivationStore
from mi_pipe.core.errors import ConfigError
from mi_pipe.similarity.hsic import FEWEST_ROWS, ProductSums
from mi_pipe.similarity.sides import Side, blocks, compared_sides

_BYTES = 8
Pair = tuple[int, int]


def cka(
    store: ActivationStore,
    other: ActivationStore | None = None,
    *,
    hooks: str | list[str] | None = None,
    other_hooks: str | list[str] | None = None,
    where: str | None = None,
    with_massive: bool = False,
    n_groups: int = 0,
    seed: int = 0,
    memory_bytes: int = 1 << 29,
) -> xr.Dataset:
    """Return linear CKA of each hook point of `store` with each of `other` (default: itself), as (hook, other_hook).

    `cka` is the debiased estimate; `cka_biased` is Kornblith et al.'s, `chance` what the latter comes to on average if
    the rows of one side are permuted; with `n_groups` of at least 2, `standard_error` that of `cka` over groups of
    prompts (as much work again). `effective_rows` and `other_effective_rows` say how many rows the products at a hook
    point come down to, (Σ‖x‖²)² / Σ‖x‖⁴: where these are few, CKA tells little of the others. `compared_sides` says
    what `hooks`, `other_hooks`, `where` and `with_massive` mean. Raises ConfigError as that does, and for fewer than 4
    rows.
    """
    sides = compared_sides(store, other, hooks, other_hooks, where, with_massive)
    found = _sums(sides, memory_bytes)
    first, second = _places(sides)
    figures = {"cka": found.debiased(), "cka_biased": found.biased(), "chance": found.chance()}
    if n_groups > 1:
        parts = [_sums((a, b), memory_bytes).debiased() for a, b in _groups(sides, n_groups, seed)]
        figures["standard_error"] = np.std(parts, axis=0, ddof=1) / np.sqrt(n_groups)
    dims, rows = ("hook", "other_hook"), found.effective_rows()
    return xr.Dataset(
        {name: (dims, values[np.ix_(first, second)]) for name, values in figures.items()}
        | {"effective_rows": ("hook", rows[first]), "other_effective_rows": ("other_hook", rows[second])},
        {"hook": sides[0].hooks, "other_hook": sides[1].hooks},
        {"store": store.id, "other_store": sides[1].store.id, "n_rows": found.n_rows, "where": where or ""},
    )


@dataclass(frozen=True)
class _Sites:
    """All hook points of a comparison, those of both sides after one another unless the sides are one store."""

    sides: tuple[Side, Side]
    names: list[tuple[int, str]]
    """Side and hook point."""

    def read(self, site: int, rows: slice, mean: Float[np.ndarray, " width"]) -> Float[np.ndarray, "row width"]:
        """Return centred rows, float32."""
        side, hook = self.names[site]
        values = self.sides[side].read(hook, rows.start, rows.stop)
        values -= mean.astype(np.float32)
        return values

    def mean(self, site: int) -> Float[np.ndarray, " width"]:
        side, hook = self.names[site]
        n_rows = len(self.sides[side].rows)
        total = sum(self.sides[side].read(hook, r.start, r.stop).sum(0, dtype=np.float64) for r in blocks(n_rows))
        return np.asarray(total) / n_rows


def _sites(sides: tuple[Side, Side]) -> _Sites:
    """List hook points; one that both sides have of one store is one site."""
    names = [(0, hook) for hook in sides[0].hooks]
    is_same = sides[0].store is sides[1].store
    return _Sites(sides, names + [(1, hook) for hook in sides[1].hooks if not (is_same and hook in sides[0].hooks)])


def _places(sides: tuple[Side, Side]) -> tuple[list[int], list[int]]:
    """Return the sites of each side's hook points."""
    names, n_first = _sites(sides).names, len(sides[0].hooks)
    second = [names.index((1, hook)) if (1, hook) in names else names.index((0, hook)) for hook in sides[1].hooks]
    return list(range(n_first)), second


def _sums(sides: tuple[Side, Side], memory_bytes: int) -> ProductSums:
    """Return the sums of all pairs that are asked for, and of each site with itself."""
    n_rows = len(sides[0].rows)
    if n_rows < FEWEST_ROWS:
        raise ConfigError(f"CKA needs at least {FEWEST_ROWS} rows, and {sides[0].store.id} gives {n_rows} here.")
    sites = _sites(sides)
    means = [sites.mean(site) for site in range(len(sites.names))]
    first, second = _places(sides)
    wanted = {(min(a, b), max(a, b)) for a in first for b in second} | {(a, a) for a in range(len(means))}
    cross = np.full((len(means), len(means)), np.nan)
    for pairs in _passes(sorted(wanted), [len(mean) for mean in means], memory_bytes):
        for (a, b), value in _cross(sites, pairs, means, n_rows).items():
            cross[a, b] = cross[b, a] = value
    norms, squares = _norm_sums(sites, means, n_rows)
    return ProductSums(n_rows, cross, norms, squares)


def _passes(pairs: Iterable[Pair], widths: list[int], memory_bytes: int) -> Iterator[list[Pair]]:
    """Yield as many pairs at a time as have room for their matrices, at least one."""
    now: list[Pair] = []
    used = 0
    for a, b in pairs:
        size = widths[a] * widths[b] * _BYTES
        if now and used + size > memory_bytes:
            yield now
            now, used = [], 0
        now.append((a, b))
        used += size
    yield now


def _cross(
    sites: _Sites, pairs: list[Pair], means: list[Float[np.ndarray, " width"]], n_rows: int
) -> dict[Pair, float]:
    """Return ‖XᵀY‖² of some pairs, in one pass over the rows."""
    totals = {(a, b): np.zeros((len(means[a]), len(means[b]))) for a, b in pairs}
    for rows in blocks(n_rows):
        values = {site: sites.read(site, rows, means[site]) for site in sorted({s for pair in pairs for s in pair})}
        for (a, b), total in totals.items():
            total += values[a].T @ values[b]
    return {pair: float(np.square(total).sum()) for pair, total in totals.items()}


def _norm_sums(
    sites: _Sites, means: list[Float[np.ndarray, " width"]], n_rows: int
) -> tuple[Float[np.ndarray, "site site"], Float[np.ndarray, " site"]]:
    norms, squares = np.zeros((len(means), len(means))), np.zeros(len(means))
    for rows in blocks(n_rows):
        found = np.stack([_squared_norms(sites.read(site, rows, mean)) for site, mean in enumerate(means)], axis=1)
        norms += found.T @ found
        squares += found.sum(0)
    return norms, squares


def _squared_norms(values: Float[np.ndarray, "row width"]) -> Float[np.ndarray, " row"]:
    return np.einsum("ij,ij->i", values, values).astype(np.float64)


def _groups(sides: tuple[Side, Side], n_groups: int, seed: int) -> Iterator[tuple[Side, Side]]:
    """Yield the sides with the rows of each group of prompts; prompts are dealt out at random."""
    prompts, which = np.unique(sides[0].prompts, return_inverse=True)
    if len(prompts) < n_groups:
        raise ConfigError(f"{n_groups} groups of prompts were asked for, and there are {len(prompts)} prompts.")
    dealt: Int[np.ndarray, " prompt"] = np.random.default_rng(seed).permutation(len(prompts)) % n_groups
    for group in range(n_groups):
        chosen = np.flatnonzero(dealt[which] == group)
        yield sides[0].at(chosen), sides[1].at(chosen)
