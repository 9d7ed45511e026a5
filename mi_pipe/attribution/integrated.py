"""Integrated gradients at nodes: AtP with the gradient averaged on a path between the two runs.

Points on the path have alpha from 0, the corrupted run, to 1, the clean run, in both directions of patching: "left",
"right" and "midpoint" are those of `circuits.eap.ig_alphas`. Two paths (they are different methods):

inputs       the embeddings are e' + alpha (e - e'), and all nodes' gradients come from these same runs (the path of
             EAP-IG-inputs, Hanna et al. 2024; Sundararajan et al. 2017 at the embeddings). m runs in all.
activations  one kind at one layer, all its nodes and positions, is a' + alpha (a - a'), the rest as in the base run
             (Marks et al. 2024; "EAP-IG-activations" of MIB). m runs for each kind and layer. As m grows a layer's
             effects sum to what patching them all together does, exactly.
"""

from collections.abc import Sequence

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
    sites = sites_of(kinds, model.info)
    base, donor = _both(model, pairs, metric, sites)
    total: dict[Site, Tensor] = {}
    for alpha in alphas:
        start = _between(base.values[_EMBED], donor.values[_EMBED], alpha, direction)
        run = run_nodes(model, pairs.base, metric, sites, embed=start, with_gradients=True)
        for site, gradient in run.gradients(sites).items():
            total[site] = total[site] + wide(gradient) if site in total else wide(gradient)
    mean = {site: gradient / len(alphas) for site, gradient in total.items()}
    effects = linear_effects(model, differences(base, donor, sites), mean)
    return Attribution(effects, summed_over_positions(effects), base.metric, donor.metric)


def ig_activations(
    model: Model,
    pairs: PairTokens,
    metric: RunMetric,
    kinds: Sequence[Kind],
    alphas: Sequence[float],
    direction: Direction,
) -> Attribution:
    """Return the attribution of every node with gradients averaged on the path of its own kind and layer."""
    sites = sites_of(kinds, model.info)
    base, donor = _both(model, pairs, metric, sites)
    mean: dict[Site, Tensor] = {}
    for site in sites:
        found: list[Tensor] = []
        for alpha in alphas:
            start = {site: _between(base.values[site], donor.values[site], alpha, direction)}
            run = run_nodes(model, pairs.base, metric, [site], start=start, with_gradients=True)
            found.append(wide(run.gradients([site])[site]))
        mean[site] = torch.stack(found).mean(0)
    effects = linear_effects(model, differences(base, donor, sites), mean)
    return Attribution(effects, summed_over_positions(effects), base.metric, donor.metric)


def _both(model: Model, pairs: PairTokens, metric: RunMetric, sites: Sequence[Site]) -> tuple[NodeRun, NodeRun]:
    seen = list(dict.fromkeys([_EMBED, *sites]))
    return run_nodes(model, pairs.base, metric, seen), run_nodes(model, pairs.donor, metric, seen)


def _between(base: Tensor, donor: Tensor, alpha: float, direction: Direction) -> Tensor:
    """Return the point alpha on the way from the corrupted value (0) to the clean one (1)."""
    clean, corrupted = (donor, base) if direction == "denoising" else (base, donor)
    return torch.lerp(corrupted, clean, alpha)
