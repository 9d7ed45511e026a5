"""GradDrop of AtP*: effects that cancel along different paths are seen (Kramár et al. 2024, section 3.1.2, eq. 11).

    c(n) = 1/(L - 1) sum over layers l of |I_l(n)|

where I_l(n) is the attribution of node n with the gradient that flows back through layer l's attention and MLP set to
zero; what flows through the residual stream past them stays. L backward passes on one forward pass. A node inside layer
l has I_l(n) = 0, hence L - 1; nodes of the residual stream itself have L terms, and their mean is taken over L.
Values are not negative: a direction is lost.
"""

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from mi_pipe.attribution.nodes import IN_BRANCH, Kind, Site
from mi_pipe.attribution.recording import NodeRun


def branch_sites(layer: int, has_mlp: bool) -> list[Site]:
    """Return where a layer's contributions enter the residual stream."""
    return [Site("attn_out", layer), *([Site("mlp_out", layer)] if has_mlp else [])]


def n_terms(kind: Kind, n_layers: int) -> int:
    """Return what the sum over dropped layers is divided by.

    >>> n_terms("z", 12), n_terms("resid_pre", 12), n_terms("z", 1)
    (11, 12, 1)
    """
    return max(n_layers - 1, 1) if kind in IN_BRANCH else n_layers


def dropped_gradients(
    run: NodeRun, sites: Sequence[Site], n_layers: int, has_mlp: bool
) -> Iterator[dict[Site, Tensor]]:
    """Yield, layer by layer, the gradients at `sites` without what flows through that layer's attention and MLP.

    The run must have recorded `branch_sites` of every layer, with gradients.
    """
    for layer in range(n_layers):
        dropped = branch_sites(layer, has_mlp)
        with _dropped([run.values[site] for site in dropped]):
            found = run.gradients(sites, keep_graph=layer < n_layers - 1)
        # Autograd hands out a tensor's gradient as it is before the tensor's own hooks.
        yield found | {site: torch.zeros_like(found[site]) for site in dropped if site in found}


@contextmanager
def _dropped(values: Sequence[Tensor]) -> Generator[None]:
    handles = [value.register_hook(torch.zeros_like) for value in values]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
