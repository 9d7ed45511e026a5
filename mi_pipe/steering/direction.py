"""A direction: where it is added, a unit vector, and the length of a step of coefficient 1.

Steering replaces x at a hook point by x + coefficient · scale · d. What a coefficient of 1 means follows from where the
direction came from: of a contrast the distance of the two means (then x + coefficient · (mean⁺ - mean⁻), as in Turner
et al. 2023 and Panickssery et al. 2023), of a probe the deviation of its training rows along d, of an SAE feature the
norm of its decoder row (then the coefficient is the activation that is added).
"""

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mi_pipe.core.errors import ConfigError, HookPointError, near_names
from mi_pipe.models.hook_points import HookMap
from mi_pipe.models.reading import Columns
from mi_pipe.probes.probe_set import ProbeSet
from mi_pipe.saes.sae import SAE

Kind = Literal["contrast", "probe", "feature", "random", "given"]


@dataclass(frozen=True, eq=False)
class Direction:
    """A unit vector at a hook point."""

    hook: str
    unit: Float[Tensor, " d"]
    """float32, on the CPU, of norm 1."""
    scale: float
    """Length of a step of coefficient 1."""
    kind: Kind = "given"
    source: str = ""
    """What it was made from, for people."""

    @classmethod
    def of(
        cls, hook: str, vector: Float[Tensor, " d"], kind: Kind = "given", source: str = "", scale: float | None = None
    ) -> "Direction":
        """Return the direction of a vector, whose norm is the scale unless another is given.

        Raises ConfigError for a vector that is zero or not finite.
        """
        wide = vector.detach().double().cpu().reshape(-1)
        norm = float(wide.norm())
        if not 0 < norm < float("inf"):
            raise ConfigError(f"The direction at {hook} ({source or kind}) has norm {norm:g}: it points nowhere.")
        return cls(hook, (wide / norm).float(), norm if scale is None else float(scale), kind, source)

    def step(self, coefficient: float) -> Float[Tensor, " d"]:
        """Return what is added at a coefficient, float32."""
        return (coefficient * self.scale) * self.unit

    def with_scale(self, scale: float) -> "Direction":
        """Return the same direction with steps of another length."""
        return replace(self, scale=float(scale))


def from_probe(probes: ProbeSet, label: str, hook: str, position: str) -> Direction:
    """Return the direction along which a linear probe's reading grows, scaled by the training rows' deviation.

    Raises ConfigError if there is no such probe.
    """
    deviation = np.asarray(probes.find(label, hook, position)["deviation"], float)
    unit = torch.from_numpy(probes.direction(label, hook, position))
    return Direction.of(hook, unit, "probe", f"probe of {label} at {position} ({probes.id})", scale=float(deviation))


def from_feature(sae: SAE, feature: int, hook: str | None = None) -> Direction:
    """Return the decoder direction of a feature of an SAE, transcoder or crosscoder at a hook point it reconstructs.

    `hook` chooses among those of a crosscoder. Raises ConfigError if the feature or the hook point is not there, or the
    feature's decoder row is zero.
    """
    outputs = sae.sites.outputs
    if not 0 <= feature < len(sae.W_dec):
        raise ConfigError(f"SAE {sae.name} has features 0 to {len(sae.W_dec) - 1}, not {feature}.")
    if hook is None and len(outputs) > 1:
        raise ConfigError(f"SAE {sae.name} reconstructs {', '.join(outputs)}: say at which hook point to steer.")
    chosen = hook or sae.hook_out
    if chosen not in outputs:
        raise ConfigError(
            f"SAE {sae.name} reconstructs {', '.join(outputs)}, not {chosen}.{near_names(chosen, outputs)}"
        )
    start = sum(sae.sites.output_widths[: outputs.index(chosen)])
    part = sae.W_dec.detach()[feature, start : start + sae.sites.output_widths[outputs.index(chosen)]]
    return Direction.of(chosen, part, "feature", f"feature {feature} of {sae.name}")


def random_like(direction: Direction, seed: int) -> Direction:
    """Return a random direction with steps of the same length at the same hook point."""
    vector = torch.randn(len(direction.unit), generator=torch.Generator().manual_seed(seed))
    return Direction.of(direction.hook, vector, "random", f"random, seed {seed}", scale=direction.scale)


def check_hook(hooks: HookMap, hook: str) -> None:
    """Raise HookPointError if a hook point is not there, or nothing can be added to its value on the plain model."""
    site = hooks[hook]
    is_columns = site.derived is not None and isinstance(site.derived.rule, Columns)
    if not site.shape or (site.module_path is None and not is_columns):
        raise HookPointError(
            f"Hook point {hook!r} is no value of the model's own modules that could be steered. Steer the residual "
            "stream (blocks.0.hook_resid_post) or the input or output of a module."
        )


def check_width(hooks: HookMap, direction: Direction) -> None:
    """Raise ConfigError if a direction does not fit the hook point, and HookPointError as `check_hook` does."""
    check_hook(hooks, direction.hook)
    width = hooks[direction.hook].width
    if width != len(direction.unit):
        raise ConfigError(
            f"The direction ({direction.source or direction.kind}) has {len(direction.unit)} values, and "
            f"{direction.hook} has {width} in this model: it was made with another model."
        )
