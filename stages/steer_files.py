"""The files of the stage `steer`: what waits in scratch, put together into tables and Zarr groups."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
import xarray as xr
from safetensors.numpy import load_file, save_file

from mi_pipe.core import atomic
from mi_pipe.core.manifest import Scalar
from mi_pipe.core.workspace import Workspace
from mi_pipe.models.hook_points import layer_of
from mi_pipe.models.source import source_vocabulary
from mi_pipe.steering import steering as files
from mi_pipe.steering.config import SteeringConfig
from mi_pipe.steering.direction import Direction
from mi_pipe.steering.steering import effects_dataset
from mi_pipe.steering.summary import effect_table, main_figures
from stages.steer_plan import Inputs, Plan, task_key, text_key

_AXES = ("direction", "coefficient")
_NO_LAYER = -1


def save_values(work: Workspace, key: str, values: np.ndarray) -> None:
    """Put a unit's values into scratch."""
    with atomic.atomic_path(_file(work, key)) as temp:
        save_file({"values": np.ascontiguousarray(values)}, temp)


def _load_values(work: Workspace, key: str) -> np.ndarray:
    return load_file(_file(work, key))["values"]


def _file(work: Workspace, key: str) -> Path:
    return work.scratch / f"{key}.safetensors"


def write_files(
    config: SteeringConfig, plan: Plan, inputs: Inputs, directions: Mapping[str, Direction], work: Workspace
) -> dict[str, Scalar]:
    """Write tables and arrays from what is in scratch; return the main figures."""
    table = _direction_table(directions)
    work.write_table(files.DIRECTIONS_FILE, table)
    work.write_tensors(files.UNITS_FILE, {name: direction.unit for name, direction in directions.items()})
    names, measures = list(directions), {}
    for place, name in enumerate(plan.tasks):
        measures[name] = _metric_dataset(config, plan, inputs, place, names, work)
    if plan.text:
        measures[files.LOSS] = _loss_dataset(config, plan, inputs, names, work)
    for name, dataset in measures.items():
        folder = files.LOSS_FOLDER if name == files.LOSS else f"{files.TASKS_FOLDER}/{name}.zarr"
        dataset.to_zarr(work.path(folder), mode="w", zarr_format=3, consolidated=False)
    if plan.writers:
        work.write_table(files.GENERATIONS_FILE, _generations(plan, inputs, work))
    tables = [effect_table(dataset.assign_coords(direction=names), name) for name, dataset in measures.items()]
    effects = pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()
    controls = [str(name) for name in table.loc[table["kind"] == "random", "direction"]]
    return {**main_figures(effects, controls), "n_directions": len(plan.directions)}


def _metric_dataset(
    config: SteeringConfig, plan: Plan, inputs: Inputs, place: int, names: list[str], work: Workspace
) -> xr.Dataset:
    name, chunks = list(plan.tasks.items())[place]
    values = np.concatenate([_load_values(work, task_key(name, chunk)) for chunk in chunks], axis=-1)
    pairs = np.concatenate([chunk.group.pairs for chunk in chunks]).astype(np.int32)
    facts = {"metric": config.metric, "positions": config.positions, "run": "clean", "task": inputs.tasks[place].id}
    variables = {"metric": ((*_AXES, "pair"), values)}
    return effects_dataset(variables, names, config.coefficients, facts | _of_model(inputs), pair=pairs)


def _loss_dataset(config: SteeringConfig, plan: Plan, inputs: Inputs, names: list[str], work: Workspace) -> xr.Dataset:
    assert inputs.prompts is not None, "chunks of text are prompts'"
    values = np.concatenate([_load_values(work, chunk.key) for chunk in plan.text], axis=-1)
    prompts = np.concatenate([chunk.prompts for chunk in plan.text])
    n_tokens = (np.diff(inputs.prompts.offsets)[prompts] - 1).astype(np.int32)
    facts = {"positions": "all", "unit": "nats a token", "prompts": inputs.prompts.id}
    variables = {"loss": ((*_AXES, "prompt"), values), "n_tokens": (("prompt",), n_tokens)}
    coordinate = prompts.astype(np.int32)
    return effects_dataset(variables, names, config.coefficients, facts | _of_model(inputs), prompt=coordinate)


def _of_model(inputs: Inputs) -> dict[str, str]:
    return {"model": inputs.model.id, "dtype": getattr(inputs.model, "dtype", "float32")}


def _direction_table(directions: Mapping[str, Direction]) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "direction": name,
            "kind": direction.kind,
            "hook": direction.hook,
            "layer": np.int32(_NO_LAYER if (layer := layer_of(direction.hook)) is None else layer),
            "scale": direction.scale,
            "source": direction.source,
            "control_of": name.partition("~")[0] if direction.kind == "random" else "",
        }
        for name, direction in directions.items()
    )


def _generations(plan: Plan, inputs: Inputs, work: Workspace) -> pd.DataFrame:
    frame = pd.concat(
        [pd.read_parquet(work.scratch / f"{text_key(writer)}.parquet") for writer in plan.writers], ignore_index=True
    )
    vocabulary = source_vocabulary(inputs.model)
    shown = [vocabulary.decode([int(token) for token in prompt]) for prompt in plan.beginnings]
    frame.insert(4, "prompt_text", [shown[int(i)] for i in frame["prompt"]])
    return frame
