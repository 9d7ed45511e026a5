"""From a config and what is there to what is trained: the SAEs of a sweep, and where a continued training begins."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mi_pipe.core.errors import ConfigError, HookPointError, near_names
from mi_pipe.saes.config import TrainSAEsConfig
from mi_pipe.saes.sae_set import SAESet
from mi_pipe.saes.sites import Sites
from mi_pipe.saes.sweep import SAESpec, grid

_KEPT = ("batch_rows", "data", "jumprelu", "matryoshka_fractions", "p_end", "skip")
"""Options without which the state of a finished training means nothing to one that goes on from it."""


@dataclass(frozen=True)
class Start:
    """Where a training begins that goes on from a finished one: steps done, and each SAE's state by name."""

    step: int
    state_of: Callable[[str], dict[str, Tensor]]


def plan_sweep(config: TrainSAEsConfig, widths: Mapping[str, int], where: str) -> list[SAESpec]:
    """Return the SAEs to train, site by site, given the width of each hook point that `where` (an id) holds.

    Raises HookPointError for hook points that it does not hold, ConfigError for options that contradict each other.
    """
    has_jumprelu = "jumprelu" in _listed(config.architecture)
    if has_jumprelu and config.sparsity.coefficient is not None and config.jumprelu.loss == "target":
        raise ConfigError(
            "saes: sparsity.coefficient replaces k, and jumprelu.loss=target aims at k. Use jumprelu.loss=step or "
            "tanh, or leave the coefficient out."
        )
    lr = config.optimisation.lr
    return grid(
        _sites(config, widths, where),
        _listed(config.architecture),
        _listed(config.k),
        _listed(config.d_sae),
        config.seeds,
        lr if isinstance(lr, list) and len(lr) > 1 else [None],
        _listed(config.sparsity.coefficient),
    )


def _sites(config: TrainSAEsConfig, widths: Mapping[str, int], where: str) -> list[Sites]:
    def width(hook: str) -> int:
        if hook not in widths:
            near = near_names(hook, list(widths))
            raise HookPointError(
                f"saes.hooks: {where} holds no activations of {hook!r}.{near} It holds {', '.join(widths)}."
            )
        return widths[hook]

    return [Sites.parse(text, width) for text in config.hooks or widths]


def _listed(value: Any) -> list[Any]:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def start_of(
    config: TrainSAEsConfig, before: SAESet | None, digests: Mapping[str, str], specs: list[SAESpec]
) -> Start | None:
    """Return where to go on, given the digests of the stores (`activations`, and `other` where there is one).

    Raises ConfigError if that training is not of the same SAEs on the same rows with fewer tokens.
    """
    if before is None:
        return None
    for spec in specs:
        if spec.name not in before.names:
            known = ", ".join(before.names)
            raise ConfigError(f"saes.start_from: {before.id} has no {spec.name}, only {known}. Give the same options.")
        before.state_of(spec.name)
    old = TrainSAEsConfig.model_validate(before.manifest.config)
    read = {name: ref.digest for name, ref in before.inputs.items() if name in ("activations", "other")}
    differing = [name for name in _KEPT if getattr(config, name) != getattr(old, name)]
    if read != digests:
        differing.insert(0, "activations" if read["activations"] != digests["activations"] else "other_store")
    if differing:
        raise ConfigError(
            f"saes.start_from: {before.id} was trained with other {' and '.join(differing)}. A training goes on with "
            f"the same {', '.join(('activations', *_KEPT))}."
        )
    if old.n_steps >= config.n_steps:
        raise ConfigError(
            f"saes.start_from: {before.id} has {old.n_steps:,} steps of {old.batch_rows:,} rows already; ask for more "
            f"than these in n_tokens (here {config.n_steps:,} steps)."
        )
    return Start(old.n_steps, before.state_of)
