"""What a run of the stage `patch` will do, from config, prompts, the model's hook points and SAEs' configs alone."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Self

from pydantic import Field, NonNegativeInt, PositiveInt, field_validator, model_validator

from mi_pipe.core.config import Config, Execution
from mi_pipe.core.errors import ConfigError
from mi_pipe.models.device import pick_device
from mi_pipe.models.info import ModelInfo
from mi_pipe.models.source import ModelSource, source_hooks
from mi_pipe.patching.choice import check_neurons
from mi_pipe.patching.chunks import Chunk, check_fits, choose_pairs, chunks_of
from mi_pipe.patching.engine import SHORTCUTS, Shortcut
from mi_pipe.patching.interventions import Intervention, donor_groups
from mi_pipe.patching.metrics import Direction, find_metric, metric_source
from mi_pipe.patching.places import places_mask
from mi_pipe.patching.sae_places import SAEPlace, check_features, check_places, places_in, saes_by_layer
from mi_pipe.patching.units import (
    DEFAULT_UNITS,
    Unit,
    axes_of,
    is_of_sae,
    layers_of,
    n_parts,
    part_of,
    present_units,
)
from mi_pipe.prompts.prompt_set import PairGroup, PromptSet
from mi_pipe.saes.sae_set import SAESet


@dataclass(frozen=True)
class Inputs:
    """A model, the task whose pairs are patched, and the SAEs of which features and errors are."""

    model: ModelSource
    task: PromptSet
    saes: SAESet | None = None


class PatchConfig(Config):
    """Which activations are patched, which way, what is read, and on how many pairs."""

    units: Annotated[list[Unit], Field(min_length=1, default_factory=lambda: list(DEFAULT_UNITS))]
    """What is patched: embed, resid_pre, resid_mid, resid_post, attn_out, mlp_out by position; head_out, q, k, v,
    pattern by head; head_out_by_pos and so on by head and position; neuron; sae_feature and sae_error of the recipe's
    SAEs, sae_feature_by_pos and sae_error_by_pos by position."""
    direction: Direction = "denoising"
    """denoising puts clean values into the corrupted run, noising corrupted values into the clean run."""
    intervention: Intervention = "patch"
    """patch: the other run's value; zero, mean, mean_by_position (and template), resample (another pair)."""
    metric: str = "logit_diff"
    """logit_diff, probability, prob_diff, loss, kl, or module:callable for a function (logits, pairs) of your own."""
    positions: list[str] | None = None
    """Named positions of the task (IOI: io, s1, s1+1, s2, end) that units by position are patched at; null for all."""
    neurons: PositiveInt | Annotated[list[NonNegativeInt], Field(min_length=1)] = 32
    """For the unit neuron: how many of each layer (those that differ most between the runs), or a list of them."""
    saes: Annotated[list[str], Field(min_length=1)] | None = None
    """For units of SAEs: their names or hook points, one SAE a layer; null for all of the set."""
    features: PositiveInt | Annotated[list[NonNegativeInt], Field(min_length=1)] = 32
    """For the unit sae_feature: how many of each SAE (those that differ most between the runs), or a list of them."""
    seed: NonNegativeInt = 0
    """Seed of resample."""
    max_pairs: PositiveInt | None = 32
    """Pairs that are patched, the first of the task; null for all."""
    tasks: Annotated[list[str] | None, Execution()] = None
    """Names of the recipe's tasks that are patched; null for all."""
    device: Annotated[str, Execution()] = "auto"
    """auto, cuda, cuda:1, mps or cpu."""
    batch_tokens: Annotated[PositiveInt | None, Execution()] = None
    """Tokens (rows times positions) of one forward pass; null for what fits into batch_mb."""
    batch_mb: Annotated[PositiveInt, Execution()] = 256
    """Memory of one forward pass, about, in MiB."""
    shortcuts: Annotated[list[Shortcut], Execution(), Field(default_factory=lambda: list(SHORTCUTS))]
    """What the engine may leave out, each exact: restart, kept_parts, prefix, last_position, answer_logits."""

    @field_validator("metric")
    @classmethod
    def _is_known(cls, name: str) -> str:
        find_metric(name)
        return name

    @model_validator(mode="after")
    def _has_patterns(self) -> Self:
        if any(unit.startswith("pattern") for unit in self.units) and self.intervention not in ("patch", "resample"):
            raise ValueError(
                f"intervention {self.intervention} has no meaning for the unit pattern; use patch or resample"
            )
        return self

    @property
    def reads_saes(self) -> bool:
        """Say whether a unit is part of an SAE."""
        return any(is_of_sae(unit) for unit in self.units)

    def identity(self) -> dict[str, Any]:
        """Return the fields that decide the result, and the source of a metric of the user's own."""
        return {**super().identity(), "metric_source": metric_source(self.metric)}


@dataclass(frozen=True)
class Plan:
    """What will be done, known before any weight is read."""

    info: ModelInfo
    units: list[Unit]
    groups: list[PairGroup]
    donors: Sequence[PairGroup]
    """The pairs that an ablation's values are of."""
    chunks: list[Chunk]
    n_chosen: dict[str, int]
    """How many neurons and features of a layer are patched."""
    saes: dict[int, SAEPlace]
    """The SAE of each layer that has one, if any are patched."""

    @property
    def n_pairs(self) -> int:
        """Number of pairs."""
        return sum(group.n_pairs for group in self.groups)

    @property
    def n_pos(self) -> int:
        """Tokens of the longest prompt."""
        return max(group.n_pos for group in self.groups)

    @property
    def n_work(self) -> int:
        """Units of work: one for the base runs of each chunk, and one for each unit and layer there."""
        return len(self.chunks) * (1 + sum(1 for _ in self.sweeps()))

    def layers(self, unit: Unit) -> list[int]:
        """Return the layers that a unit is measured at."""
        return list(self.saes if is_of_sae(unit) else layers_of(unit, self.info))

    def sweeps(self) -> Iterator[tuple[Unit, int]]:
        """Iterate over units and the layers that they are measured at."""
        return ((unit, layer) for unit in self.units for layer in self.layers(unit))

    def sizes(self, unit: Unit) -> tuple[int, ...]:
        """Return the sizes of a unit's axes."""
        parts = n_parts(unit, self.info, self.n_chosen.get(part_of(unit) or "", 0))
        return tuple(self.n_pos if axis == "pos" else parts for axis in axes_of(unit))


def make_plan(config: PatchConfig, inputs: Inputs) -> Plan:
    """Return the plan; raises what is wrong with device, prompts, units, positions, neurons, SAEs or features."""
    pick_device(config.device)
    hooks, info = source_hooks(inputs.model)
    task = inputs.task.pair_groups()
    groups = choose_pairs(task, config.max_pairs)
    donors = donor_groups(config.intervention, task, groups)
    check_fits(donors, info, inputs.task.id)
    units = present_units(config.units, hooks, info.n_layers)
    if "neuron" in units:
        check_neurons(config.neurons, info.d_mlp)
    for group in groups if config.positions else ():
        places_mask(group, config.positions or ())
    saes: dict[int, SAEPlace] = {}
    if config.reads_saes:
        if inputs.saes is None:
            asked = ", ".join(unit for unit in units if is_of_sae(unit))
            raise ConfigError(f"patch.units: {asked} need SAEs, and none were given.")
        saes = saes_by_layer(places_in(inputs.saes), config.saes)
        check_places(saes.values(), hooks, inputs.model.id)
        check_features(config.features, saes)
    counts = {"neuron": _n_chosen(config.neurons), "feature": _n_chosen(config.features)}
    return Plan(info, units, groups, donors, chunks_of(groups), counts, saes)


def _n_chosen(asked: int | list[int]) -> int:
    return asked if isinstance(asked, int) else len(asked)
