"""A sweep: which SAEs to train, from lists of options, and what each is called."""

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from mi_pipe.core.errors import ConfigError
from mi_pipe.saes.architectures.base import ArchitectureName
from mi_pipe.saes.sites import Sites

PENALISED: tuple[ArchitectureName, ...] = ("standard", "jumprelu", "gated", "p_anneal")
"""Architectures whose sparsity comes of a penalty with a coefficient."""


@dataclass(frozen=True)
class SAESpec:
    """One SAE to train."""

    sites: Sites
    architecture: ArchitectureName
    k: int
    """Features a row: exactly (topk), on average (batchtopk, matryoshka), or aimed at (the others)."""
    d_sae: int
    seed: int
    lr: float | None = None
    """Learning rate at its peak; None for the default."""
    coefficient: float | None = None
    """A fixed coefficient of the sparsity penalty, instead of `k`."""

    @property
    def name(self) -> str:
        """Folder-safe name.

        >>> SAESpec(Sites.of_sae("blocks.15.hook_resid_post", 576), "topk", 32, 4608, 0).name
        'L15.resid_post.topk.k32.d4608.s0'
        """
        sparsity = f"k{self.k}" if self.coefficient is None else f"c{self.coefficient:g}"
        rate = "" if self.lr is None else f".lr{self.lr:g}"
        return f"{self.sites.short}.{self.architecture}.{sparsity}.d{self.d_sae}.s{self.seed}{rate}"


def grid(
    sites: Sequence[Sites],
    architectures: Sequence[ArchitectureName],
    ks: Sequence[int],
    widths: Sequence[int],
    seeds: Sequence[int],
    lrs: Sequence[float | None] = (None,),
    coefficients: Sequence[float] = (),
) -> list[SAESpec]:
    """Return the product of all options, site by site; raises ConfigError for impossible or repeated ones.

    With `coefficients`, architectures with a penalty take those instead of `ks`. Learning rates are named where there
    are several.
    """
    specs = [
        SAESpec(site, architecture, k, d_sae, seed, lr, coefficient)
        for site, architecture in itertools.product(sites, architectures)
        for k, coefficient in _sparsities(architecture, ks, coefficients)
        for d_sae, seed, lr in itertools.product(widths, seeds, lrs)
    ]
    for spec in specs:
        if spec.k > spec.d_sae:
            raise ConfigError(f"saes: k={spec.k} is more than d_sae={spec.d_sae}. Use a smaller k or a larger d_sae.")
    repeated = [name for name, n in Counter(spec.name for spec in specs).items() if n > 1]
    if repeated:
        raise ConfigError(f"saes: the sweep has {repeated[0]} more than once. Give each option once.")
    return specs


def _sparsities(
    architecture: ArchitectureName, ks: Sequence[int], coefficients: Sequence[float]
) -> list[tuple[int, float | None]]:
    if coefficients and architecture in PENALISED:
        return [(1, coefficient) for coefficient in coefficients]
    return [(k, None) for k in ks]
