"""Which hook points' covariances a harvest keeps: by default those that cost next to nothing.

A covariance takes width² / 2 multiply-adds a row and width² numbers a hook point. One hook point in a model's middle
costs about 1 % of the time of its forward pass on the same processor, one in every layer 4 to 8 %.
"""

from collections.abc import Sequence
from typing import Literal

from mi_pipe.models.hook_points import HookSite
from mi_pipe.models.info import ModelInfo

CovarianceChoice = Literal["auto", "always", "never"]

_WIDEST = 1024
_SHARE = 0.01
_FREE_PRODUCTS = 10_000
"""Multiply-adds a row that nobody notices: some 0.2 microseconds."""


def with_covariance(choice: CovarianceChoice, sites: Sequence[HookSite], info: ModelInfo) -> frozenset[str]:
    """Return the names of the hook points whose covariance is kept.

    Auto means those up to 1,024 wide, if all of them together take at most 1 % of the forward pass's multiply-adds.
    """
    if choice == "always":
        return frozenset(site.name for site in sites)
    narrow = [site for site in sites if site.width <= _WIDEST]
    cost = sum(site.width**2 / 2 for site in narrow)
    if choice == "never" or cost > _FREE_PRODUCTS + _SHARE * _forward_products(sites, info):
        return frozenset()
    return frozenset(site.name for site in narrow)


def _forward_products(sites: Sequence[HookSite], info: ModelInfo) -> int:
    """Return the multiply-adds a token of the layers that the hook points need, attention's own left out."""
    layers = [info.n_layers if site.layer is None else site.layer + 1 for site in sites]
    heads = 2 * info.d_model * info.d_head * (info.n_heads + info.n_kv_heads)
    return max(layers) * (heads + 2 * info.d_model * (info.d_mlp or 0))
