"""What the stage `probes` does, decided before anything is fitted: which rows have which labels at which positions."""

from dataclasses import dataclass
from functools import cached_property
from typing import Annotated

import numpy as np
from jaxtyping import Bool
from pydantic import Field

from mi_pipe.activations.hook_choice import choose_hooks
from mi_pipe.activations.store import ActivationStore
from mi_pipe.core.config import Config, Execution
from mi_pipe.core.errors import ConfigError, near_names
from mi_pipe.models.device import pick_device
from mi_pipe.models.source import ModelSource
from mi_pipe.probes.config import CausalConfig, LabelConfig, ProbeOptions, SplitConfig
from mi_pipe.probes.labels import check_label, column_names, column_values, labels_of
from mi_pipe.probes.positions import check_positions, rows_at
from mi_pipe.probes.split import split_prompts
from mi_pipe.probes.task import ProbeTask, make_task
from mi_pipe.prompts.prompt_set import PromptSet
from stages.probe_causal import check_causal


@dataclass(frozen=True)
class Inputs:
    """Activations, and for causal checks their model and prompts."""

    activations: ActivationStore
    model: ModelSource | None = None
    prompts: PromptSet | None = None


class ProbesConfig(Config):
    """What is read, from where, and how."""

    labels: Annotated[dict[str, LabelConfig], Field(min_length=1)]
    """What probes are to read, by a name of your choice."""
    hooks: Annotated[list[str], Field(min_length=1)] | None = None
    """Hook points of the store, `*` for any number; null for all."""
    positions: Annotated[tuple[str, ...], Field(min_length=1)] = ("last",)
    """Where: all, last, each, a number, a pos_ column's name (end, s2, subject), or a condition on rows."""
    where: str | None = None
    """A condition that all rows fulfil, such as "role == 'clean'"."""
    split: SplitConfig = SplitConfig()
    """Prompts for training, validation and test."""
    fit: ProbeOptions = ProbeOptions()
    """Kinds of probes, penalties, control tasks."""
    causal: CausalConfig | None = None
    """Move activations along each linear probe's direction; {} for the defaults."""
    device: Annotated[str, Execution()] = "auto"
    """auto, cuda, cuda:1, mps or cpu; probes are fitted in float64, so on mps on the CPU."""


@dataclass(frozen=True)
class Unit:
    """One label at one hook point and position."""

    label: str
    hook: str
    position: str


class Plan:
    """What will be done: which rows have which labels where."""

    def __init__(self, config: ProbesConfig, inputs: Inputs) -> None:
        """Check names and conditions; tables are read when first asked for."""
        self._config, self._store = config, inputs.activations
        self.hooks = choose_hooks(config.hooks, inputs.activations)
        check_positions(inputs.activations, config.positions, config.where)
        for name, label in config.labels.items():
            check_label(inputs.activations, name, label)
        control = config.fit.control
        if control and control not in (known := column_names(inputs.activations)):
            near = near_names(control, known) or f" Columns are {', '.join(known)}."
            raise ConfigError(f"probes.fit.control: {inputs.activations.id} has no column {control!r}.{near}")
        self.split = split_prompts(inputs.activations, config.split)
        pick_device(config.device)
        if config.causal:
            check_causal(self.hooks, inputs.model, inputs.prompts, inputs.activations)
            if "linear" not in config.fit.kinds:
                raise ConfigError(
                    "probes.causal moves activations along linear probes: add linear to probes.fit.kinds."
                )

    @cached_property
    def tasks(self) -> dict[tuple[str, str], ProbeTask | str]:
        """Each label's task at each position, or why there is none; raises ConfigError if there is none at all."""
        store, config = self._store, self._config
        rows = {
            name: found[self._usable[found]] for name, found in rows_at(store, config.positions, config.where).items()
        }
        types = column_values(store, config.fit.control) if config.fit.control else None
        cluster = self.split.cluster[store.prompt_idx]
        found: dict[tuple[str, str], ProbeTask | str] = {}
        for name, spec in config.labels.items():
            labels = labels_of(store, name, spec)
            for position, at in rows.items():
                parts = self.split.parts(at[labels.is_known[at]], store.prompt_idx)
                found[name, position] = make_task(parts, labels, types, cluster, config.fit)
        if all(isinstance(task, str) for task in found.values()):
            reasons = "; ".join(f"{label} at {position}: {reason}" for (label, position), reason in found.items())
            raise ConfigError(f"No probe can be fitted on {store.id}: {reasons}. probes.positions chooses other rows.")
        return found

    @property
    def units(self) -> list[Unit]:
        """What is fitted, label by label."""
        chosen = [key for key, task in self.tasks.items() if isinstance(task, ProbeTask)]
        return [Unit(label, hook, position) for label, position in chosen for hook in self.hooks]

    def task(self, unit: Unit) -> ProbeTask:
        """Return a unit's task."""
        task = self.tasks[unit.label, unit.position]
        assert isinstance(task, ProbeTask), "units have tasks"
        return task

    @property
    def skipped(self) -> list[dict[str, str]]:
        """Labels and positions without a probe, and why."""
        return [
            {"label": label, "position": position, "reason": task}
            for (label, position), task in self.tasks.items()
            if isinstance(task, str)
        ]

    @cached_property
    def _usable(self) -> Bool[np.ndarray, " row"]:
        usable = np.ones(self._store.n_rows, bool)
        for hook in self.hooks:
            usable &= ~self._store.massive(hook)
        return usable
