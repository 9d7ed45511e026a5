"""Attribution patching (AtP): the effect of replacing a node's value, to first order in the replacement.

    I(n) = (a_donor - a_base) . dm/da at the base run               (Nanda 2023; Kramár et al. 2024, eq. 4)

The base run is patched and the donor run gives the values: denoising patches clean values into the corrupted run,
noising corrupted ones into the clean run. I(n) estimates m(patched) - m(base). Two forward passes and one backward
pass give it for every node at once. Values are per pair; Kramár et al. rank nodes by the mean over pairs of |I(n)|.

Everything here is linear in the gradient, so that AtP*, which changes gradients (`grad_drop`) or what they meet
(`qk_fix`), and integrated gradients, which average them, share it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mi_pipe.attribution.nodes import Kind, Site, sites_of
from mi_pipe.attribution.recording import NodeRun, RunMetric, run_nodes
from mi_pipe.models.model import Model
from mi_pipe.patching.readout import wide

Effects = dict[Kind, Float[Tensor, "pair *axes"]]
"""By kind, with the axes that `nodes.axes_of` names; float32 or wider."""


@dataclass(frozen=True)
class PairTokens:
    """The prompts of pairs of one length, by role in the patching."""

    base: Int[Tensor, "pair pos"]
    donor: Int[Tensor, "pair pos"]


@dataclass(frozen=True)
class Attribution:
    """What one method gave for some pairs of one length."""

    effects: Effects
    """Estimated m(patched) - m(base) of every node."""
    whole: Effects
    """The same of a node at all positions together, for kinds with positions: without the axis pos."""
    base: Float[Tensor, " pair"]
    """The metric of the base run."""
    donor: Float[Tensor, " pair"]


def atp(model: Model, pairs: PairTokens, metric: RunMetric, kinds: Sequence[Kind]) -> Attribution:
    """Return the attribution of every node of these kinds by AtP."""
    sites = sites_of(kinds, model.info)
    base = run_nodes(model, pairs.base, metric, sites, with_gradients=True)
    donor = run_nodes(model, pairs.donor, metric, sites)
    effects = linear_effects(model, differences(base, donor, sites), base.gradients(sites))
    return Attribution(effects, summed_over_positions(effects), base.metric.detach(), donor.metric)


def differences(base: NodeRun, donor: NodeRun, sites: Sequence[Site]) -> dict[Site, Tensor]:
    """Return a_donor - a_base of each site, float32 or wider."""
    return {site: wide(donor.values[site].detach()) - wide(base.values[site].detach()) for site in sites}


def linear_effects(model: Model, change: Mapping[Site, Tensor], gradients: Mapping[Site, Tensor]) -> Effects:
    """Return the product of change and gradient, summed within each node, by kind."""
    by_kind: dict[Kind, list[Tensor]] = {}
    for site, difference in change.items():
        product = difference * wide(gradients[site])
        by_kind.setdefault(site.kind, []).append(within_nodes(site.kind, product, model.info.n_heads))
    return stacked(by_kind)


def within_nodes(kind: Kind, product: Tensor, n_heads: int) -> Tensor:
    """Sum a layer's products over what belongs to one node."""
    if kind == "neuron":
        return product.sum(1)
    if kind == "z":
        return product.unflatten(-1, (n_heads, -1)).sum(-1).transpose(1, 2)
    return product.sum(-1)


def stacked(by_kind: Mapping[Kind, Sequence[Tensor]]) -> Effects:
    """Put the layers of each kind together; embed has none."""
    return {kind: some[0] if kind == "embed" else torch.stack(list(some), 1) for kind, some in by_kind.items()}


def summed_over_positions(effects: Effects) -> Effects:
    """Return the effect of each node at all positions, of kinds with positions: to first order, the sum."""
    return {kind: value.sum(-1) for kind, value in effects.items() if kind != "neuron"}
