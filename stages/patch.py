"""Stage `patch`: exact activation patching of every layer's units, one task a run.

A unit of work is one kind of activation at one layer for a batch of pairs; its values wait in scratch until the
last is there, and are then put together into one Zarr group.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import Field, PositiveInt

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
from mi_pipe.patching.engine import PatchEngine, make_engine
from mi_pipe.patching.metrics import Direction
from mi_pipe.patching.runs import PairRuns, run_pairs
from mi_pipe.patching.sweep import UNITS, Unit, hook_of, present_units, sweep_layer
from mi_pipe.prompts.prompt_set import PairGroup, PromptSet

_FLOAT_BYTES = 4
_TABLE_BYTES = 200_000
_BASE = "base"


@dataclass(frozen=True)
class Inputs:
    """A model and the task whose pairs are patched."""

    model: ModelSource
    task: PromptSet


class PatchConfig(Config):
    """Which activations are patched, which way, and on how many pairs."""

    units: Annotated[list[Unit], Field(min_length=1, default_factory=lambda: list(UNITS))]
    """What is patched: resid_pre, attn_out, mlp_out by layer and position, head_out by layer and head."""
    direction: Direction = "denoising"
    """denoising puts clean values into the corrupted run, noising corrupted values into the clean run."""
    metric: Literal["logit_diff"] = "logit_diff"
    """logit_diff: logit of the answer minus logit of the wrong token, at the last position."""
    max_pairs: PositiveInt | None = 32
    """Pairs that are patched, the first of the task; null for all."""
    tasks: Annotated[list[str] | None, Execution()] = None
    """Names of the recipe's tasks that are patched; null for all."""
    device: Annotated[str, Execution()] = "auto"
    """auto, cuda, cuda:1, mps or cpu."""
    batch_tokens: Annotated[PositiveInt, Execution()] = 2048
    """Tokens (rows times positions) of one forward pass."""


@dataclass(frozen=True)
class _Plan:
    """What will be done, known before any weight is read."""

    info: ModelInfo
    units: list[Unit]
    groups: list[PairGroup]
    chunks: list[Chunk]

    @property
    def n_pairs(self) -> int:
        return sum(group.n_pairs for group in self.groups)

    @property
    def n_pos(self) -> int:
        return max(group.n_pos for group in self.groups)

    @property
    def n_work(self) -> int:
        return len(self.chunks) * (1 + len(self.units) * self.info.n_layers)

    def n_columns(self, unit: Unit) -> int:
        return self.info.n_heads if unit == "head_out" else self.n_pos


def _plan(config: PatchConfig, inputs: Inputs) -> _Plan:
    pick_device(config.device)
    hooks, info = source_hooks(inputs.model)
    groups = choose_pairs(inputs.task.pair_groups(), config.max_pairs)
    check_fits(groups, info, inputs.task.id)
    units = present_units(config.units, hooks, info.n_layers)
    return _Plan(info, units, groups, chunks_of(groups))


def estimate(config: PatchConfig, inputs: Inputs) -> Estimate:
    """Return the size of the effect arrays and the number of units of work."""
    plan = _plan(config, inputs)
    cells = sum(plan.n_pairs * plan.info.n_layers * plan.n_columns(unit) for unit in plan.units)
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
        for chunk in plan.chunks:
            _sweep_chunk(config, plan, model, chunk, work)
    return _assemble(config, plan, inputs, work)


def _sweep_chunk(config: PatchConfig, plan: _Plan, model: Model, chunk: Chunk, work: Workspace) -> None:
    todo: list[tuple[Unit, int]] = [
        (unit, layer)
        for unit in plan.units
        for layer in range(plan.info.n_layers)
        if _key(chunk, unit, layer) not in work.ledger
    ]
    if not todo:
        return
    runs = run_pairs(model, chunk.group, config.direction, [hook_of(unit, layer) for unit, layer in todo])
    engine, error = make_engine(model, runs)
    _store_base(config, runs, engine, error, chunk, work)
    for unit, layer in todo:
        values = sweep_layer(engine, unit, layer, plan.info.n_heads, config.batch_tokens)
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
    work.ledger.mark(_key(chunk, _BASE), engine=type(engine).__name__, error=error)


def _assemble(config: PatchConfig, plan: _Plan, inputs: Inputs, work: Workspace) -> dict[str, Scalar]:
    bases = np.concatenate([_load(work, _key(chunk, _BASE)) for chunk in plan.chunks], axis=1)
    clean, corrupted = bases[0].astype(np.float32), bases[1].astype(np.float32)
    table = pair_table(plan.chunks, inputs.task, clean, corrupted, bases[2].astype(np.int32))
    values: dict[Unit, np.ndarray] = {}
    for unit in plan.units:
        values[unit] = gather_values(
            plan.chunks,
            plan.info.n_layers,
            plan.n_columns(unit),
            lambda chunk, layer, unit=unit: _load(work, _key(chunk, unit, layer)),
        )
    tokens = token_arrays(plan.chunks, plan.n_pos)
    pairs, attributes = table["pair"].to_numpy(), _attributes(config, inputs)
    dataset = effects_dataset(values, clean, corrupted, tokens, pairs, attributes)
    dataset.to_zarr(work.path(EFFECTS_FOLDER), mode="w", zarr_format=3, consolidated=False)
    work.write_table(PAIRS_FILE, table)
    checks = [work.ledger.info(_key(chunk, _BASE)) for chunk in plan.chunks]
    return {
        **main_figures(clean, corrupted, values.get("head_out"), config.direction),
        "engine": ", ".join(sorted({check["engine"] for check in checks})),
        "engine_error": max(check["error"] for check in checks),
    }


def _attributes(config: PatchConfig, inputs: Inputs) -> dict[str, str]:
    return {
        "direction": config.direction,
        "base_run": "corrupted" if config.direction == "denoising" else "clean",
        "metric": config.metric,
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


STAGE = Stage(name="patch", version=1, config=PatchConfig, inputs=Inputs, run=run, estimate=estimate)
