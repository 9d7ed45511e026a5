"""Stage `patch`: exact activation patching of every layer's units, one task a run.

A unit of work is one kind of activation at one layer for a batch of pairs; its values wait in scratch until the
last is there, and are then put together into one Zarr group.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mi_pipe.core import atomic
from mi_pipe.core.errors import StageError
from mi_pipe.core.manifest import Scalar
from mi_pipe.core.stage import Estimate, Stage
from mi_pipe.core.workspace import Workspace
from mi_pipe.models.model import Model
from mi_pipe.models.source import load_source
from mi_pipe.patching.assembly import gather_values, main_figures, pair_table, token_arrays, token_texts
from mi_pipe.patching.choice import chosen_features, chosen_neurons
from mi_pipe.patching.chunks import Chunk
from mi_pipe.patching.effects import EFFECTS_FOLDER, PAIRS_FILE, effects_dataset
from mi_pipe.patching.engine import SHORTCUTS, PatchEngine, make_engine
from mi_pipe.patching.interventions import Ablation, n_without_others
from mi_pipe.patching.metrics import find_metric
from mi_pipe.patching.places import places_mask
from mi_pipe.patching.runs import PairRuns, run_pairs
from mi_pipe.patching.sae_parts import SAEParts
from mi_pipe.patching.sweep import batch_tokens, sweep_layer
from mi_pipe.patching.units import Unit, hook_of, is_of_sae, layers_of, part_of
from stages.patch_plan import Inputs, PatchConfig, Plan, make_plan

__all__ = ["STAGE", "Inputs", "PatchConfig"]

_FLOAT_BYTES = 4
_TABLE_BYTES = 200_000
_BASE = "base"
_NEURONS, _FEATURES = "neurons", "features"
NO_FEATURE = -1


@dataclass(frozen=True)
class _Job:
    """One run: what is asked, and what of the model's and the SAEs' is the same for all pairs."""

    config: PatchConfig
    plan: Plan
    work: Workspace
    model: Model
    saes: SAEParts | None
    ablation: Ablation | None
    neurons: list[list[int]]


def estimate(config: PatchConfig, inputs: Inputs) -> Estimate:
    """Return the size of the effect arrays and the number of units of work."""
    plan = make_plan(config, inputs)
    cells = sum(plan.n_pairs * len(layers_of(unit, plan.info)) * math.prod(plan.sizes(unit)) for unit in plan.units)
    missing = [unit for unit in config.units if unit not in plan.units and "units" in config.model_fields_set]
    notes = [f"the model has no {', '.join(missing)}"] if missing else []
    if n_alone := n_without_others(config.intervention, plan.groups, plan.donors):
        alike = "template and length" if config.intervention == "mean_by_position" else "length"
        notes.append(f"{n_alone} of {plan.n_pairs} pairs are alone of their {alike}, and get their own donor's values")
    # Scratch holds every value once more.
    return Estimate(2 * cells * _FLOAT_BYTES + _TABLE_BYTES, plan.n_work, "layers", tuple(notes))


def run(config: PatchConfig, inputs: Inputs, work: Workspace) -> dict[str, Scalar]:
    """Sweep what the ledger does not have yet, then assemble and write the effects."""
    plan = make_plan(config, inputs)
    work.ledger.expect(plan.n_work)
    if work.ledger.n_done < plan.n_work:
        job = _job(config, plan, inputs, work)
        for chunk in plan.chunks:
            _sweep_chunk(job, chunk)
    return _assemble(config, plan, inputs, work)


def _job(config: PatchConfig, plan: Plan, inputs: Inputs, work: Workspace) -> _Job:
    """Load model and SAEs, and choose neurons and features unless that was done."""
    model = load_source(inputs.model, config.device)
    if "neuron" in plan.units and not _file(work, _NEURONS).exists():
        _save(work, _NEURONS, chosen_neurons(model, plan.groups, config.neurons).numpy())
    saes = _sae_parts(config, plan, inputs, work, model) if plan.saes else None
    ablation = None
    if config.intervention != "patch":
        ablation = Ablation(config.intervention, config.direction, plan.donors, config.seed, saes)
    neurons = _load(work, _NEURONS).tolist() if "neuron" in plan.units else []
    return _Job(config, plan, work, model, saes, ablation, neurons)


def _sae_parts(config: PatchConfig, plan: Plan, inputs: Inputs, work: Workspace, model: Model) -> SAEParts:
    assert inputs.saes is not None, "the plan has some of them"
    saes = {layer: inputs.saes[place.name].to(model.device) for layer, place in plan.saes.items()}
    if not _file(work, _FEATURES).exists():
        _save(work, _FEATURES, chosen_features(model, plan.groups, list(saes.values()), config.features).numpy())
    features = torch.from_numpy(_load(work, _FEATURES)).to(model.device)
    return SAEParts(saes, dict(zip(saes, features, strict=True)))


def _sweep_chunk(job: _Job, chunk: Chunk) -> None:
    plan, work = job.plan, job.work
    todo: list[tuple[Unit, int]] = [
        (unit, layer) for unit, layer in plan.sweeps() if _key(chunk, unit, layer) not in work.ledger
    ]
    if not todo:
        return
    metric = find_metric(job.config.metric)
    hooks = dict.fromkeys(_hook(plan, unit, layer) for unit, layer in todo)
    runs = run_pairs(job.model, chunk.group, job.config.direction, list(hooks), metric, job.ablation, job.saes)
    engine, error = make_engine(job.model, runs, job.config.shortcuts)
    _store_base(job, runs, engine, error, chunk)
    tokens = job.config.batch_tokens or batch_tokens(plan.info, job.config.batch_mb << 20, metric.needs_all_logits)
    only = None
    if job.config.positions is not None:
        only = torch.from_numpy(places_mask(chunk.group, job.config.positions)).to(job.model.device)
    for unit, layer in todo:
        values = sweep_layer(engine, unit, layer, tokens, only, job.neurons[layer] if job.neurons else ())
        _save(work, _key(chunk, unit, layer), values)
        work.ledger.mark(_key(chunk, unit, layer))
        work.progress.update(
            work.ledger.n_done, plan.n_work, "layers", f"{unit} {layer}, prompts of {chunk.group.n_pos} tokens"
        )


def _hook(plan: Plan, unit: Unit, layer: int) -> str:
    return hook_of(unit, layer, plan.saes[layer].hook if is_of_sae(unit) else None)


def _store_base(job: _Job, runs: PairRuns, engine: PatchEngine, error: float, chunk: Chunk) -> None:
    """Store the two unpatched runs' metrics and the first differing positions, and which engine agreed how well.

    Raises StageError for metrics that are no finite numbers.
    """
    key = _key(chunk, _BASE)
    if key in job.work.ledger:
        return
    base, donor = runs.base_metric, runs.donor_metric
    if not bool((base.isfinite() & donor.isfinite()).all()):
        raise StageError(
            f"The metric {job.config.metric} of unpatched runs is not a finite number (pairs of {runs.n_pos} tokens), "
            f"so that patched runs have nothing to be compared with; the model's dtype is {job.model.dtype}."
        )
    clean, corrupted = (donor, base) if job.config.direction == "denoising" else (base, donor)
    rows = [values.cpu().numpy() for values in (clean, corrupted, runs.first_change)]
    _save(job.work, key, np.stack(rows))
    left_out = ", ".join(name for name in SHORTCUTS if name in getattr(engine, "shortcuts", ()))
    job.work.ledger.mark(key, engine=type(engine).__name__, error=error, shortcuts=left_out or "none")


def _assemble(config: PatchConfig, plan: Plan, inputs: Inputs, work: Workspace) -> dict[str, Scalar]:
    bases = np.concatenate([_load(work, _key(chunk, _BASE)) for chunk in plan.chunks], axis=1)
    clean, corrupted = bases[0].astype(np.float32), bases[1].astype(np.float32)
    table = pair_table(plan.chunks, inputs.task, clean, corrupted, bases[2].astype(np.int32))
    values: dict[Unit, np.ndarray] = {}
    for unit in plan.units:
        values[unit] = gather_values(
            plan.chunks,
            len(layers_of(unit, plan.info)),
            plan.layers(unit),
            plan.sizes(unit),
            lambda chunk, layer, unit=unit: _load(work, _key(chunk, unit, layer)),
        )
    tokens = token_arrays(plan.chunks, plan.n_pos)
    pairs, attributes = table["pair"].to_numpy(), _attributes(config, plan, inputs)
    coordinates = {"token": (("pair", "pos"), token_texts(table["labels"], plan.n_pos)), **_chosen(plan, work)}
    dataset = effects_dataset(values, clean, corrupted, tokens, pairs, attributes, coordinates)
    dataset.to_zarr(work.path(EFFECTS_FOLDER), mode="w", zarr_format=3, consolidated=False)
    work.write_table(PAIRS_FILE, table)
    checks = [work.ledger.info(_key(chunk, _BASE)) for chunk in plan.chunks]
    return {
        **main_figures(clean, corrupted, values.get("head_out"), config.direction, config.metric),
        "engine": ", ".join(sorted({check["engine"] for check in checks})),
        "shortcuts": "; ".join(sorted({check["shortcuts"] for check in checks})),
        "engine_error": max(check["error"] for check in checks),
    }


def _chosen(plan: Plan, work: Workspace) -> dict[str, tuple[tuple[str, ...], np.ndarray]]:
    """Return which neurons and features were patched, as coordinates; NO_FEATURE in layers without an SAE."""
    found: dict[str, tuple[tuple[str, ...], np.ndarray]] = {}
    if "neuron" in plan.units:
        found["neuron_id"] = (("layer", "neuron"), _load(work, _NEURONS).astype(np.int32))
    if any(part_of(unit) == "feature" for unit in plan.units):
        features = np.full((plan.info.n_layers, plan.n_chosen["feature"]), NO_FEATURE, np.int32)
        features[list(plan.saes)] = _load(work, _FEATURES)
        found["feature_id"] = (("layer", "feature"), features)
    return found


def _attributes(config: PatchConfig, plan: Plan, inputs: Inputs) -> dict[str, Any]:
    found: dict[str, Any] = {
        "direction": config.direction,
        "base_run": "corrupted" if config.direction == "denoising" else "clean",
        "intervention": config.intervention,
        "donor_pairs": sum(group.n_pairs for group in plan.donors),
        "metric": config.metric,
        "positions": "all" if config.positions is None else ", ".join(config.positions),
        "aggregation": "none: one value a pair; fractions are ratios of means over pairs",
        "dtype": getattr(inputs.model, "dtype", "float32"),
        "model": inputs.model.id,
        "task": inputs.task.id,
    }
    if inputs.saes is not None and plan.saes:
        names = {layer: place.name for layer, place in plan.saes.items()}
        hooks = {layer: place.hook for layer, place in plan.saes.items()}
        found["sae_set"] = inputs.saes.id
        found["saes"] = [names.get(layer, "") for layer in range(plan.info.n_layers)]
        found["sae_hooks"] = [hooks.get(layer, "") for layer in range(plan.info.n_layers)]
    return found


def _key(chunk: Chunk, unit: str, layer: int | None = None) -> str:
    return f"{chunk.name}/{unit}" if layer is None else f"{chunk.name}/{unit}.{layer}"


def _file(work: Workspace, key: str) -> Path:
    return work.scratch / f"{key}.npy"


def _save(work: Workspace, key: str, values: np.ndarray) -> None:
    with atomic.atomic_path(_file(work, key)) as temp, temp.open("wb") as file:
        np.save(file, values, allow_pickle=False)


def _load(work: Workspace, key: str) -> np.ndarray:
    return np.load(_file(work, key), allow_pickle=False)


STAGE = Stage(name="patch", version=4, config=PatchConfig, inputs=Inputs, run=run, estimate=estimate)
