"""Stage `patch`: exact activation patching of every layer's units, one task a run.

A unit of work is one kind of activation at one layer for a batch of pairs; its values wait in scratch until the
last is there, and are then put together into one Zarr group.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self

import numpy as np
import torch
from pydantic import Field, NonNegativeInt, PositiveInt, field_validator, model_validator

from mi_pipe.core import atomic
from mi_pipe.core.config import Config, Execution
from mi_pipe.core.manifest import Scalar
from mi_pipe.core.stage import Estimate, Stage
from mi_pipe.core.workspace import Workspace
from mi_pipe.models.device import pick_device
from mi_pipe.models.info import ModelInfo
from mi_pipe.models.model import Model
from mi_pipe.models.source import ModelSource, load_source, source_hooks
from mi_pipe.patching.assembly import gather_values, main_figures, pair_table, token_arrays
from mi_pipe.patching.chunks import Chunk, check_fits, choose_pairs, chunks_of
from mi_pipe.patching.effects import EFFECTS_FOLDER, PAIRS_FILE, effects_dataset
from mi_pipe.patching.engine import SHORTCUTS, PatchEngine, Shortcut, make_engine
from mi_pipe.patching.interventions import Ablation, Intervention
from mi_pipe.patching.metrics import Direction, find_metric, metric_source
from mi_pipe.patching.neurons import check_neurons, chosen_neurons
from mi_pipe.patching.places import places_mask
from mi_pipe.patching.runs import PairRuns, run_pairs
from mi_pipe.patching.sweep import batch_tokens, sweep_layer
from mi_pipe.patching.units import DEFAULT_UNITS, Unit, axes_of, hook_of, layers_of, n_parts, present_units
from mi_pipe.prompts.prompt_set import PairGroup, PromptSet

_FLOAT_BYTES = 4
_TABLE_BYTES = 200_000
_BASE = "base"
_NEURONS = "neurons"


@dataclass(frozen=True)
class Inputs:
    """A model and the task whose pairs are patched."""

    model: ModelSource
    task: PromptSet


class PatchConfig(Config):
    """Which activations are patched, which way, what is read, and on how many pairs."""

    units: Annotated[list[Unit], Field(min_length=1, default_factory=lambda: list(DEFAULT_UNITS))]
    """What is patched: embed, resid_pre, resid_mid, resid_post, attn_out, mlp_out by position; head_out, q, k, v,
    pattern by head; head_out_by_pos and so on by head and position; neuron."""
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

    def identity(self) -> dict[str, Any]:
        """Return the fields that decide the result, and the source of a metric of the user's own."""
        return {**super().identity(), "metric_source": metric_source(self.metric)}


@dataclass(frozen=True)
class _Plan:
    """What will be done, known before any weight is read."""

    info: ModelInfo
    units: list[Unit]
    groups: list[PairGroup]
    chunks: list[Chunk]
    n_neurons: int

    @property
    def n_pairs(self) -> int:
        return sum(group.n_pairs for group in self.groups)

    @property
    def n_pos(self) -> int:
        return max(group.n_pos for group in self.groups)

    @property
    def n_work(self) -> int:
        return len(self.chunks) * (1 + sum(len(layers_of(unit, self.info)) for unit in self.units))

    def sizes(self, unit: Unit) -> tuple[int, ...]:
        """Return the sizes of a unit's axes."""
        parts = n_parts(unit, self.info, self.n_neurons)
        return tuple(self.n_pos if axis == "pos" else parts for axis in axes_of(unit))


def _plan(config: PatchConfig, inputs: Inputs) -> _Plan:
    pick_device(config.device)
    hooks, info = source_hooks(inputs.model)
    groups = choose_pairs(inputs.task.pair_groups(), config.max_pairs)
    check_fits(groups, info, inputs.task.id)
    units = present_units(config.units, hooks, info.n_layers)
    if "neuron" in units:
        check_neurons(config.neurons, info.d_mlp)
    for group in groups if config.positions else ():
        places_mask(group, config.positions or ())
    n_neurons = config.neurons if isinstance(config.neurons, int) else len(config.neurons)
    return _Plan(info, units, groups, chunks_of(groups), n_neurons)


def estimate(config: PatchConfig, inputs: Inputs) -> Estimate:
    """Return the size of the effect arrays and the number of units of work."""
    plan = _plan(config, inputs)
    cells = sum(plan.n_pairs * len(layers_of(unit, plan.info)) * math.prod(plan.sizes(unit)) for unit in plan.units)
    missing = [unit for unit in config.units if unit not in plan.units]
    notes = (f"the model has no {', '.join(missing)}",) if missing else ()
    # Scratch holds every value once more.
    return Estimate(2 * cells * _FLOAT_BYTES + _TABLE_BYTES, plan.n_work, "layers", notes)


def run(config: PatchConfig, inputs: Inputs, work: Workspace) -> dict[str, Scalar]:
    """Sweep what the ledger does not have yet, then assemble and write the effects."""
    plan = _plan(config, inputs)
    work.ledger.expect(plan.n_work)
    if work.ledger.n_done < plan.n_work:
        model = load_source(inputs.model, config.device)
        if "neuron" in plan.units and not _file(work, _NEURONS).exists():
            _save(work, _NEURONS, chosen_neurons(model, plan.groups, config.neurons).numpy())
        ablation = None
        if config.intervention != "patch":
            ablation = Ablation(config.intervention, config.direction, plan.groups, config.seed)
        for chunk in plan.chunks:
            _sweep_chunk(config, plan, model, chunk, ablation, work)
    return _assemble(config, plan, inputs, work)


def _sweep_chunk(
    config: PatchConfig, plan: _Plan, model: Model, chunk: Chunk, ablation: Ablation | None, work: Workspace
) -> None:
    todo: list[tuple[Unit, int]] = [
        (unit, layer)
        for unit in plan.units
        for layer in layers_of(unit, plan.info)
        if _key(chunk, unit, layer) not in work.ledger
    ]
    if not todo:
        return
    metric, hooks = find_metric(config.metric), dict.fromkeys(hook_of(unit, layer) for unit, layer in todo)
    runs = run_pairs(model, chunk.group, config.direction, list(hooks), metric, ablation)
    engine, error = make_engine(model, runs, config.shortcuts)
    _store_base(config, runs, engine, error, chunk, work)
    tokens = config.batch_tokens or batch_tokens(plan.info, config.batch_mb << 20, metric.needs_all_logits)
    only = None
    if config.positions is not None:
        only = torch.from_numpy(places_mask(chunk.group, config.positions)).to(model.device)
    neurons = _load(work, _NEURONS).tolist() if "neuron" in plan.units else []
    for unit, layer in todo:
        values = sweep_layer(engine, unit, layer, tokens, only, neurons[layer] if neurons else ())
        _save(work, _key(chunk, unit, layer), values)
        work.ledger.mark(_key(chunk, unit, layer))
        work.progress.update(
            work.ledger.n_done, plan.n_work, "layers", f"{unit} {layer}, prompts of {chunk.group.n_pos} tokens"
        )


def _store_base(
    config: PatchConfig, runs: PairRuns, engine: PatchEngine, error: float, chunk: Chunk, work: Workspace
) -> None:
    """Store the two unpatched runs' metrics and the first differing positions, and which engine agreed how well."""
    if _key(chunk, _BASE) in work.ledger:
        return
    base, donor = runs.base_metric, runs.donor_metric
    clean, corrupted = (donor, base) if config.direction == "denoising" else (base, donor)
    rows = [values.cpu().numpy() for values in (clean, corrupted, runs.first_change)]
    _save(work, _key(chunk, _BASE), np.stack(rows))
    left_out = ", ".join(name for name in SHORTCUTS if name in getattr(engine, "shortcuts", ()))
    work.ledger.mark(_key(chunk, _BASE), engine=type(engine).__name__, error=error, shortcuts=left_out or "none")


def _assemble(config: PatchConfig, plan: _Plan, inputs: Inputs, work: Workspace) -> dict[str, Scalar]:
    bases = np.concatenate([_load(work, _key(chunk, _BASE)) for chunk in plan.chunks], axis=1)
    clean, corrupted = bases[0].astype(np.float32), bases[1].astype(np.float32)
    table = pair_table(plan.chunks, inputs.task, clean, corrupted, bases[2].astype(np.int32))
    values: dict[Unit, np.ndarray] = {}
    for unit in plan.units:
        values[unit] = gather_values(
            plan.chunks,
            len(layers_of(unit, plan.info)),
            plan.sizes(unit),
            lambda chunk, layer, unit=unit: _load(work, _key(chunk, unit, layer)),
        )
    tokens = token_arrays(plan.chunks, plan.n_pos)
    pairs, attributes = table["pair"].to_numpy(), _attributes(config, inputs)
    neurons = _load(work, _NEURONS) if "neuron" in plan.units else None
    dataset = effects_dataset(values, clean, corrupted, tokens, pairs, attributes, neurons)
    dataset.to_zarr(work.path(EFFECTS_FOLDER), mode="w", zarr_format=3, consolidated=False)
    work.write_table(PAIRS_FILE, table)
    checks = [work.ledger.info(_key(chunk, _BASE)) for chunk in plan.chunks]
    return {
        **main_figures(clean, corrupted, values.get("head_out"), config.direction, config.metric),
        "engine": ", ".join(sorted({check["engine"] for check in checks})),
        "shortcuts": "; ".join(sorted({check["shortcuts"] for check in checks})),
        "engine_error": max(check["error"] for check in checks),
    }


def _attributes(config: PatchConfig, inputs: Inputs) -> dict[str, str]:
    return {
        "direction": config.direction,
        "base_run": "corrupted" if config.direction == "denoising" else "clean",
        "intervention": config.intervention,
        "metric": config.metric,
        "positions": "all" if config.positions is None else ", ".join(config.positions),
        "aggregation": "none: one value a pair; fractions are ratios of means over pairs",
        "dtype": getattr(inputs.model, "dtype", "float32"),
        "model": inputs.model.id,
        "task": inputs.task.id,
    }


def _key(chunk: Chunk, unit: str, layer: int | None = None) -> str:
    return f"{chunk.name}/{unit}" if layer is None else f"{chunk.name}/{unit}.{layer}"


def _file(work: Workspace, key: str) -> Path:
    return work.scratch / f"{key}.npy"


def _save(work: Workspace, key: str, values: np.ndarray) -> None:
    with atomic.atomic_path(_file(work, key)) as temp, temp.open("wb") as file:
        np.save(file, values, allow_pickle=False)


def _load(work: Workspace, key: str) -> np.ndarray:
    return np.load(_file(work, key), allow_pickle=False)


STAGE = Stage(name="patch", version=2, config=PatchConfig, inputs=Inputs, run=run, estimate=estimate)
