"""Stage `steer`: directions, what adding them does to a metric and to the loss on text, and what the model then writes.

Units of work: the directions; each batch of pairs and of text under every direction and coefficient; the texts of each
direction. What they give waits in scratch until the last is there.
"""

import json

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from mi_pipe.core import atomic
from mi_pipe.core.manifest import Scalar
from mi_pipe.core.stage import Estimate, Stage
from mi_pipe.core.workspace import Workspace
from mi_pipe.models.model import Model
from mi_pipe.models.source import load_source, source_hooks
from mi_pipe.patching.chunks import Chunk
from mi_pipe.patching.metrics import find_metric
from mi_pipe.steering.config import SteeringConfig
from mi_pipe.steering.contrast import from_contrast
from mi_pipe.steering.direction import Direction, random_like
from mi_pipe.steering.measuring import metric_values, text_losses
from mi_pipe.steering.scales import norm_scaled, reach_scaled
from mi_pipe.steering.texts import Writing, steered_texts
from stages.steer_files import save_values, write_files
from stages.steer_plan import DIRECTIONS, Contrast, Inputs, Plan, TextChunk, make_plan, task_key, text_key

__all__ = ["STAGE", "Inputs", "SteeringConfig"]

_FLOAT_BYTES = 4
_ROW_BYTES = 64
_TABLE_BYTES = 200_000


def estimate(config: SteeringConfig, inputs: Inputs) -> Estimate:
    """Return the size of arrays and tables, and the number of units of work."""
    plan = make_plan(config, inputs)
    hooks, _ = source_hooks(inputs.model)
    n_runs = len(plan.directions) * (1 + config.n_random) * len(config.coefficients)
    n_prompts = sum(chunk.group.n_pairs for chunks in plan.tasks.values() for chunk in chunks)
    n_prompts += sum(len(chunk.prompts) for chunk in plan.text)
    size = 2 * n_runs * n_prompts * _FLOAT_BYTES + _TABLE_BYTES
    size += 2 * n_runs * max((site.width for site in hooks), default=0) * _FLOAT_BYTES
    if config.generation is not None:
        n_texts = n_runs * len(plan.beginnings) * (1 + config.generation.n_samples)
        size += 2 * n_texts * config.generation.n_tokens * _ROW_BYTES
    return Estimate(size, len(plan.keys), "batches", plan.notes)


def run(config: SteeringConfig, inputs: Inputs, work: Workspace) -> dict[str, Scalar]:
    """Do what the ledger does not have, and write arrays and tables."""
    plan = make_plan(config, inputs)
    work.ledger.expect(len(plan.keys))
    is_done = all(key in work.ledger for key in plan.keys)
    model = None if is_done else load_source(inputs.model, config.device)
    if model is not None:
        _find_directions(config, plan, inputs, model, work)
    real = _stored_directions(plan, work)
    every = real | {
        f"{name}~random{k}": random_like(direction, config.seed + k)
        for name, direction in real.items()
        for k in range(config.n_random)
    }
    if model is not None:
        for task, chunks in plan.tasks.items():
            for chunk in chunks:
                _measure_metric(config, every, model, task, chunk, work)
        for chunk in plan.text:
            _measure_loss(config, every, model, inputs, chunk, work)
        for writer in plan.writers:
            _write_texts(config, plan, real.get(writer), writer, model, work)
    return write_files(config, plan, inputs, every, work)


def _find_directions(config: SteeringConfig, plan: Plan, inputs: Inputs, model: Model, work: Workspace) -> None:
    if DIRECTIONS in work.ledger:
        return
    found: dict[str, Direction] = {}
    for name, known in plan.directions.items():
        item = config.directions[name]
        if isinstance(known, Contrast):
            position = "last" if item.contrast is None else item.contrast.position
            hook = item.hook or ""
            known = from_contrast(model, known.positive, known.negative, hook, position, config.batch_tokens)
        if item.scale == "norm":
            known = norm_scaled(model, known, plan.scaling, config.batch_tokens)
        elif item.scale != "natural":
            known = known.with_scale(item.scale)
        elif item.feature is not None and inputs.saes is not None:
            sae, index = inputs.saes[item.feature.sae], item.feature.index
            known = reach_scaled(model, known, sae, index, plan.scaling, config.batch_tokens)
        found[name] = known
    with atomic.atomic_path(work.scratch / f"{DIRECTIONS}.safetensors") as temp:
        save_file({name: direction.unit for name, direction in found.items()}, temp)
    facts = {name: {key: getattr(d, key) for key in ("hook", "scale", "kind", "source")} for name, d in found.items()}
    atomic.write_json(work.scratch / f"{DIRECTIONS}.json", facts)
    _done(work, DIRECTIONS, f"{len(found)} directions")


def _stored_directions(plan: Plan, work: Workspace) -> dict[str, Direction]:
    facts = json.loads((work.scratch / f"{DIRECTIONS}.json").read_text(encoding="utf-8"))
    units = load_file(work.scratch / f"{DIRECTIONS}.safetensors")
    return {name: Direction(unit=units[name], **facts[name]) for name in plan.directions}


def _measure_metric(
    config: SteeringConfig, directions: dict[str, Direction], model: Model, task: str, chunk: Chunk, work: Workspace
) -> None:
    key = task_key(task, chunk)
    if key in work.ledger:
        return
    metric, is_end = find_metric(config.metric), config.positions == "end"
    steered = list(directions.values())
    values = metric_values(model, steered, config.coefficients, chunk.group, metric, is_end, config.batch_tokens)
    save_values(work, key, values)
    _done(work, key, f"{task}, prompts of {chunk.group.n_pos} tokens")


def _measure_loss(
    config: SteeringConfig, directions: dict[str, Direction], model: Model, inputs: Inputs, chunk: TextChunk,
    work: Workspace,
) -> None:  # fmt: skip
    if chunk.key in work.ledger:
        return
    assert inputs.prompts is not None, "chunks of text are prompts'"
    tokens = np.stack([inputs.prompts.prompt(int(i)) for i in chunk.prompts]).astype(np.int64)
    steered = list(directions.values())
    values = text_losses(model, steered, config.coefficients, torch.from_numpy(tokens), config.batch_tokens)
    save_values(work, chunk.key, values)
    _done(work, chunk.key, f"loss on prompts of {tokens.shape[1]} tokens")


def _write_texts(
    config: SteeringConfig, plan: Plan, direction: Direction | None, name: str, model: Model, work: Workspace
) -> None:
    key, asked = text_key(name), config.generation
    if key in work.ledger:
        return
    assert asked is not None, "there are writers only then"
    from_end = config.positions == "end"
    writing = Writing(asked.n_tokens, asked.n_samples, asked.temperature, asked.seed, from_end, config.batch_tokens)
    coefficients = [coefficient for coefficient in config.coefficients if bool(coefficient) == bool(name)]
    frame = steered_texts(model, direction, coefficients, plan.beginnings, writing)
    frame.insert(0, "direction", name)
    with atomic.atomic_path(work.scratch / f"{key}.parquet") as temp:
        frame.to_parquet(temp, index=False)
    _done(work, key, f"texts under {name}" if name else "texts of the model as it is")


def _done(work: Workspace, key: str, note: str) -> None:
    work.ledger.mark(key)
    work.progress.update(work.ledger.n_done, work.ledger.n_total or 0, "batches", note)


STAGE = Stage(name="steer", version=2, config=SteeringConfig, inputs=Inputs, run=run, estimate=estimate)
