"""AtP*: attribution patching with the QK fix and GradDrop, each of which can be left out (Kramár et al. 2024).

With GradDrop, values are means of absolute values over dropped layers and do not say a direction; without it they
are signed like AtP's.
"""

from collections.abc import Mapping, Sequence

from torch import Tensor

from mi_pipe.attribution.atp import (
    Attribution,
    Effects,
    PairTokens,
    differences,
    linear_effects,
    stacked,
    summed_over_positions,
)
from mi_pipe.attribution.grad_drop import branch_sites, dropped_gradients, n_terms
from mi_pipe.attribution.nodes import Kind, Site, sites_of
from mi_pipe.attribution.qk_fix import PatternChange, pattern_change
from mi_pipe.attribution.recording import NodeRun, RunMetric, run_nodes
from mi_pipe.models.model import Model
from mi_pipe.patching.readout import wide

_FIXED: tuple[Kind, ...] = ("q", "k")


def atp_star(
    model: Model,
    pairs: PairTokens,
    metric: RunMetric,
    kinds: Sequence[Kind],
    *,
    qk_fix: bool = True,
    grad_drop: bool = True,
) -> Attribution:
    """Return the attribution of every node of these kinds by AtP*."""
    info = model.info
    sites = sites_of(kinds, info)
    fixes = qk_fix and any(kind in _FIXED for kind in kinds)
    where_patterns_act: list[Site] = sites_of(["z"], info) if fixes else []
    wanted: list[Site] = sorted({*sites, *where_patterns_act})
    branches = [site for layer in range(info.n_layers) for site in branch_sites(layer, not info.attn_only)]
    seen: list[Site] = sorted({*wanted, *branches}) if grad_drop else wanted
    base = run_nodes(model, pairs.base, metric, seen, with_gradients=True)
    donor = run_nodes(model, pairs.donor, metric, sites)
    plan = _Plan(model, base, donor, sites, fixes)
    if not grad_drop:
        effects = plan.effects(base.gradients(wanted))
        return Attribution(effects, summed_over_positions(effects), base.metric.detach(), donor.metric)
    effects, whole = {}, {}
    for gradients in dropped_gradients(base, wanted, info.n_layers, not info.attn_only):
        found = plan.effects(gradients)
        _add_absolute(effects, found, info.n_layers)
        _add_absolute(whole, summed_over_positions(found), info.n_layers)
    return Attribution(effects, whole, base.metric.detach(), donor.metric)


def _add_absolute(total: Effects, effects: Effects, n_layers: int) -> None:
    for kind, value in effects.items():
        term = value.abs() / n_terms(kind, n_layers)
        total[kind] = total[kind] + term if kind in total else term


class _Plan:
    """What does not depend on the gradient, so that it is there for every backward pass."""

    def __init__(self, model: Model, base: NodeRun, donor: NodeRun, sites: Sequence[Site], fixes: bool) -> None:
        self.model = model
        self.fixed = [site for site in sites if fixes and site.kind in _FIXED]
        self.change = differences(base, donor, [site for site in sites if site not in self.fixed])
        self.patterns: dict[int, PatternChange] = {
            layer: pattern_change(base.calls[layer], donor.calls[layer])
            for layer in {site.layer for site in self.fixed}
        }

    def effects(self, gradients: Mapping[Site, Tensor]) -> Effects:
        """Return the effects of every node under these gradients."""
        found: dict[Kind, list[Tensor]] = {}
        for site in self.fixed:
            at_z = wide(gradients[Site("z", site.layer)]).unflatten(-1, (self.model.info.n_heads, -1)).transpose(1, 2)
            pattern = self.patterns[site.layer]
            values = pattern.query_effects(at_z) if site.kind == "q" else pattern.key_effects(at_z)
            found.setdefault(site.kind, []).append(values.to(at_z.dtype))
        return {**linear_effects(self.model, self.change, gradients), **stacked(found)}
