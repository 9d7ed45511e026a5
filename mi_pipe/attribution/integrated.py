"""Integrated gradients at nodes: AtP with the gradient averaged on a path between the two runs.

Points on the path have alpha from 0, the corrupted run, to 1, the clean run, in both directions of patching: "left",
"right" and "midpoint" are those of `circuits.eap.ig_alphas`. Two paths (they are different methods):

inputs       the embeddings are e' + alpha (e - e'), and all nodes' gradients come from these same runs (the path of
             EAP-IG-inputs, Hanna et al. 2024; Sundararajan et al. 2017 at the embeddings). m runs in all.
activations  one kind at one layer, all its nodes and positions, is a' + alpha (a - a'), the rest as in the base run
             (Marks et al. 2024; "EAP-IG-activations" of MIB). m runs for each kind and layer. As m grows a layer's
             effects sum to what patching them all together does, exactly.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mi_pipe.attribution.atp import (
    Attribution,
    PairTokens,
    differences,
    linear_effects,
    summed_over_positions,
)
from mi_pipe.attribution.nodes import Kind, Site, sites_of
from mi_pipe.attribution.recording import NodeRun, RunMetric, run_nodes
from mi_pipe.models.model import Model
from mi_pipe.patching.metrics import Direction
from mi_pipe.patching.readout import wide

_EMBED = Site("embed")


def ig_inputs(
    model: Model,
    pairs: PairTokens,
    metric: RunMetric,
    kinds: Sequence[Kind],
    alphas: Sequence[float],
    direction: Direction,
) -> Attribution:
    """Return the attribution of every node with gradients averaged on the path of the embeddings."""
    ends = _both(model, pairs, metric, sites_of(kinds, model.info))
    gradients: dict[Site, Tensor] = {}
    for alpha in alphas:
        start = ends.between(_EMBED, alpha, direction)
        run = run_nodes(model, pairs.base, metric, ends.sites, embed=start, with_gradients=True)
        _add_mean(gradients, run.gradients(ends.sites), len(alphas))
    return ends.attributed(model, gradients)


def ig_activations(
    model: Model,
    pairs: PairTokens,
    metric: RunMetric,
    kinds: Sequence[Kind],
    alphas: Sequence[float],
    direction: Direction,
) -> Attribution:
    """Return the attribution of every node with gradients averaged on the path of its own kind and layer."""
    ends = _both(model, pairs, metric, sites_of(kinds, model.info))
    gradients: dict[Site, Tensor] = {}
    for site in ends.sites:
        for alpha in alphas:
            start = {site: ends.between(site, alpha, direction)}
            run = run_nodes(model, pairs.base, metric, [site], start=start, with_gradients=True)
            _add_mean(gradients, run.gradients([site]), len(alphas))
    return ends.attributed(model, gradients)


@dataclass(frozen=True)
class _Ends:
    """The two runs that a path joins."""

    sites: list[Site]
    base: NodeRun
    donor: NodeRun

    def between(self, site: Site, alpha: float, direction: Direction) -> Tensor:
        """Return the point alpha on the way from the corrupted value (0) to the clean one (1)."""
        base, donor = self.base.values[site], self.donor.values[site]
        clean, corrupted = (donor, base) if direction == "denoising" else (base, donor)
        return torch.lerp(corrupted, clean, alpha)

    def attributed(self, model: Model, gradients: dict[Site, Tensor]) -> Attribution:
        """Return what the mean gradients on the path make of the runs' difference."""
        effects = linear_effects(model, differences(self.base, self.donor, self.sites), gradients)
        return Attribution(effects, summed_over_positions(effects), self.base.metric, self.donor.metric)


def _both(model: Model, pairs: PairTokens, metric: RunMetric, sites: list[Site]) -> _Ends:
    seen = list(dict.fromkeys([_EMBED, *sites]))
    return _Ends(sites, *(run_nodes(model, tokens, metric, seen) for tokens in (pairs.base, pairs.donor)))


def _add_mean(total: dict[Site, Tensor], gradients: Mapping[Site, Tensor], n_points: int) -> None:
    for site, gradient in gradients.items():
        total[site] = total.get(site, 0) + wide(gradient) / n_points
