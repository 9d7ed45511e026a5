"""What of a recipe's SAEs can be known to fail before any work: places, widths, a second store, a training's beginning.

The stage asks the same questions when its turn comes, which may be hours later.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from mi_pipe.activations.store import ActivationStore
from mi_pipe.activations.training.source import OTHER, widths_of
from mi_pipe.core.errors import ConfigError
from mi_pipe.models.hook_points import HookMap
from mi_pipe.saes.config import TrainSAEsConfig
from mi_pipe.saes.planning import plan_sweep
from mi_pipe.saes.sae_set import SAESet
from mi_pipe.saes.sweep import SAESpec
from stages.train_saes import Inputs


@dataclass(frozen=True)
class Reads:
    """What a recipe's SAEs read, as far as it is there already."""

    activations: ActivationStore | None
    other: ActivationStore | None = None
    start: SAESet | None = None
    saes: SAESet | None = None
    """SAEs that are there instead of a training, for their features to be scored."""


def check_sweep(asked: TrainSAEsConfig, reads: Reads, hooks: HookMap | None) -> list[SAESpec]:
    """Check a sweep on activations that exist and return its SAEs; `hooks` are those of the recipe's model.

    Raises HookPointError or ConfigError for places that the stores, or the model, do not have so, for a second store of
    other tokens, and for a training to go on from that does not fit.
    """
    assert reads.activations is not None, "asked only if they exist"
    inputs = Inputs(None, None, reads.activations, reads.other, reads.start)
    specs = plan_sweep(asked, widths_of(inputs.source()), inputs.activations.id)
    inputs.beginning(asked, specs)
    for hook in dict.fromkeys(hook for spec in specs for hook in spec.sites.hooks):
        if hooks is None or hook.startswith(OTHER):
            continue
        if hooks[hook].width != reads.activations.width(hook):
            raise ConfigError(
                f"activations: {hook} is {reads.activations.width(hook)} values wide in {reads.activations.id}, and "
                f"{hooks[hook].width} in the recipe's model. Name the model of the activations, or none."
            )
    return specs


def check_planned_sweep(
    asked: TrainSAEsConfig, harvested: Mapping[str, int], other: ActivationStore | None
) -> list[SAESpec]:
    """Check a sweep on a harvest that is still to be made, given the widths of its hook points, and return its SAEs.

    Raises HookPointError or ConfigError.
    """
    widths = dict(harvested)
    if other is not None:
        widths |= {OTHER + hook: other.width(hook) for hook in other.hooks}
    return plan_sweep(asked, widths, "harvest.hooks")
