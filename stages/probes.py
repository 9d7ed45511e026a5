"""Stage `probes`: linear and MLP probes by hook point and position from an activation store, and what the model does
with what they read.

A unit of work is one label at one hook point and position, fitted or checked causally; results wait in scratch.
"""

from itertools import groupby
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file, save_file

from mi_pipe.activations.store import ActivationStore
from mi_pipe.core import atomic
from mi_pipe.core.manifest import Scalar
from mi_pipe.core.stage import Estimate, Stage
from mi_pipe.core.workspace import Workspace
from mi_pipe.models.device import pick_device
from mi_pipe.models.hook_points import layer_of
from mi_pipe.models.source import load_source
from mi_pipe.probes import probe_set as files
from mi_pipe.probes.config import CausalConfig
from mi_pipe.probes.task import ProbeTask, activations_of, run_task
from stages.probe_causal import Base, causal_bases, causal_frame
from stages.probe_plan import Inputs, Plan, ProbesConfig, Unit

_FLOAT_BYTES = 4
_ROW_BYTES = 64
_TABLE_BYTES = 200_000


def estimate(config: ProbesConfig, inputs: Inputs) -> Estimate:
    """Return the size of weights and predictions, and how many units there are."""
    plan = Plan(config, inputs)
    size = _TABLE_BYTES
    for unit in plan.units:
        task, width = plan.task(unit), inputs.activations.width(unit.hook)
        outputs = max(1, len(task.classes))
        per_kind = max(outputs, config.fit.mlp.hidden if "mlp" in config.fit.kinds else 0) * (width + outputs + 1)
        size += 2 * len(config.fit.kinds) * (per_kind * _FLOAT_BYTES + len(task.rows.test) * _ROW_BYTES)
    if config.causal:
        n_reads = len(plan.units) * len(plan.hooks) * config.causal.max_prompts
        size += 2 * n_reads * (2 * len(config.causal.amounts) + 1) * _ROW_BYTES
    n_units = len(plan.units) * (2 if config.causal else 1)
    notes = tuple(f"no probe of {item['label']} at {item['position']}: {item['reason']}" for item in plan.skipped)
    return Estimate(size, n_units, "probes", notes)


def run(config: ProbesConfig, inputs: Inputs, work: Workspace) -> dict[str, Scalar]:
    """Fit and check what the ledger does not have, and write the tables."""
    plan = Plan(config, inputs)
    n_work = len(plan.units) * (2 if config.causal else 1)
    work.ledger.expect(n_work)
    device = pick_device(config.device)
    device = device if device.type == "cuda" else torch.device("cpu")
    for i, unit in enumerate(plan.units):
        if _fit_key(i) not in work.ledger:
            _fit(config, plan.task(unit), unit, inputs.activations, device, work.scratch / _fit_key(i))
            _done(work, _fit_key(i), f"{unit.label} at {unit.hook}, {unit.position}")
    if config.causal and work.ledger.n_done < n_work:
        _check_causally(config.causal, config.device, plan, inputs, work)
    return _assemble(config, plan, inputs, work)


def _done(work: Workspace, key: str, note: str) -> None:
    work.ledger.mark(key)
    work.progress.update(work.ledger.n_done, work.ledger.n_total or 0, "probes", note)


def _fit(
    config: ProbesConfig, task: ProbeTask, unit: Unit, store: ActivationStore, device: torch.device, folder: Path
) -> None:
    x = activations_of(lambda rows: store.take(unit.hook, rows), task.rows, device)
    result = run_task(task, x, config.fit)
    frames = {"probes": pd.DataFrame(result.probes), "curves": result.curves, "predictions": result.predictions}
    for name, frame in frames.items():
        with atomic.atomic_path(folder / f"{name}.parquet") as temp:
            frame.to_parquet(temp, index=False)
    tensors = {f"{kind}.{name}": value for kind, found in result.tensors.items() for name, value in found.items()}
    with atomic.atomic_path(folder / "tensors.safetensors") as temp:
        save_file({name: value.contiguous() for name, value in tensors.items()}, temp)


def _check_causally(config: CausalConfig, device: str, plan: Plan, inputs: Inputs, work: Workspace) -> None:
    assert inputs.model is not None, "the plan has refused it"
    assert inputs.prompts is not None, "the plan has refused it"
    model = load_source(inputs.model, device)
    numbered = [(i, unit) for i, unit in enumerate(plan.units) if _causal_key(i) not in work.ledger]
    # Units are ordered by label and position, which share their prompts.
    for _, units in groupby(numbered, lambda item: (item[1].label, item[1].position)):
        bases: list[Base] = []
        for i, unit in units:
            rows = plan.task(unit).rows.test
            bases = bases or causal_bases(config, model, inputs.prompts, inputs.activations, rows, plan.hooks)
            later = _later(plan, unit, work)
            deviation = float(_probe_rows(work, i).set_index("kind").loc["linear", "deviation"])
            frame = causal_frame(config, model, inputs.prompts, bases, unit.hook, later, deviation)
            with atomic.atomic_path(work.scratch / _causal_key(i)) as temp:
                frame.to_parquet(temp, index=False)
            _done(work, _causal_key(i), f"moved along {unit.label} at {unit.hook}, {unit.position}")


def _later(plan: Plan, unit: Unit, work: Workspace) -> dict[str, dict[str, torch.Tensor]]:
    """Return the linear probes of a unit's label and position at its hook point and at later ones."""
    return {
        other.hook: _linear(work.scratch / _fit_key(j))
        for j, other in enumerate(plan.units)
        if (other.label, other.position) == (unit.label, unit.position)
        and plan.hooks.index(other.hook) >= plan.hooks.index(unit.hook)
    }


def _linear(folder: Path) -> dict[str, torch.Tensor]:
    tensors = load_file(folder / "tensors.safetensors")
    return {name.removeprefix("linear."): value for name, value in tensors.items() if name.startswith("linear.")}


def _probe_rows(work: Workspace, i: int) -> pd.DataFrame:
    return pd.read_parquet(work.scratch / _fit_key(i) / "probes.parquet")


def _assemble(config: ProbesConfig, plan: Plan, inputs: Inputs, work: Workspace) -> dict[str, Scalar]:
    store = inputs.activations
    tables: dict[str, list[pd.DataFrame]] = {"probes": [], "curves": [], "predictions": []}
    tensors: dict[str, torch.Tensor] = {}
    n_kinds = len(config.fit.kinds)
    for i, unit in enumerate(plan.units):
        number: dict[str, int] = {kind: i * n_kinds + k for k, kind in enumerate(config.fit.kinds)}
        named: dict[str, object] = {
            "label": unit.label,
            "hook": unit.hook,
            "layer": _layer(unit.hook),
            "position": unit.position,
        }
        for name, found in tables.items():
            frame = pd.read_parquet(work.scratch / _fit_key(i) / f"{name}.parquet")
            frame.insert(0, "probe", np.array([number[str(kind)] for kind in frame["kind"]], np.int32))
            found.append(_with_columns(frame, named) if name == "probes" else frame)
        for name, value in load_file(work.scratch / _fit_key(i) / "tensors.safetensors").items():
            kind, _, part = name.partition(".")
            tensors[f"{number[kind]}.{part}"] = value
    probes, curves, predictions = (pd.concat(parts, ignore_index=True) for parts in tables.values())
    rows = predictions["row"].to_numpy()
    predictions.insert(2, "prompt_idx", store.prompt_idx[rows])
    predictions.insert(3, "pos", store.pos[rows])
    work.write_table(files.PROBES_FILE, probes)
    work.write_table(files.CURVES_FILE, curves)
    work.write_table(files.PREDICTIONS_FILE, predictions.drop(columns="kind"))
    work.write_table(files.CLASSES_FILE, _classes(plan))
    work.write_tensors(files.WEIGHTS_FILE, tensors)
    work.write_json(files.SKIPPED_FILE, plan.skipped)
    if config.causal:
        work.write_table(files.CAUSAL_FILE, _causal_table(plan, work))
    return _figures(probes)


def _with_columns(frame: pd.DataFrame, named: dict[str, object]) -> pd.DataFrame:
    for place, (name, value) in enumerate(named.items(), start=1):
        frame.insert(place, name, np.int32(value) if isinstance(value, int) else value)
    return frame


def _classes(plan: Plan) -> pd.DataFrame:
    rows = [
        {"label": label, "position": position, "output": i, "name": name}
        for (label, position), task in plan.tasks.items()
        if isinstance(task, ProbeTask)
        for i, name in enumerate(task.classes)
    ]
    return pd.DataFrame(rows, columns=["label", "position", "output", "name"]).astype({"output": "int32"})


def _causal_table(plan: Plan, work: Workspace) -> pd.DataFrame:
    parts = []
    for i, unit in enumerate(plan.units):
        frame = pd.read_parquet(work.scratch / _causal_key(i))
        parts.append(_with_columns_first(frame, unit))
    return pd.concat(parts, ignore_index=True)


def _with_columns_first(frame: pd.DataFrame, unit: Unit) -> pd.DataFrame:
    named = {"label": unit.label, "hook": unit.hook, "position": unit.position}
    return pd.concat([pd.DataFrame(named, index=frame.index), frame], axis=1)


def _figures(probes: pd.DataFrame) -> dict[str, Scalar]:
    """Return the best probe of the first label, by the validation figure, with its test figure and selectivity."""
    first = probes.loc[probes["label"] == probes["label"].iloc[0]]
    best = first.loc[first["validation"].idxmax()]
    name = "accuracy" if best["n_classes"] else "r_squared"
    figures: dict[str, Scalar] = {
        "n_probes": len(probes),
        f"best_{name}": float(best["test"]),
        "best_probe": f"{best['label']} at {best['hook']}, {best['position']}, {best['kind']}",
    }
    return figures | ({} if np.isnan(best["selectivity"]) else {"best_selectivity": float(best["selectivity"])})


def _layer(hook: str) -> int:
    layer = layer_of(hook)
    return -1 if layer is None else layer


def _fit_key(i: int) -> str:
    return f"fits/{i:06d}"


def _causal_key(i: int) -> str:
    return f"causal/{i:06d}.parquet"


STAGE = Stage(name="probes", version=3, config=ProbesConfig, inputs=Inputs, run=run, estimate=estimate)
