"""Stage `attribute`: what every node of a model does to a task's metric, estimated; exact figures of some; paths.

Units of work, for each chunk of pairs: the attribution of all nodes, exact patching of the nodes that the whole ranking
chose, and each of the paths. What they give waits in scratch until the last is there.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors.numpy import load_file, save_file

from mi_pipe.attribution.assembly import gather, path_table, strongest
from mi_pipe.attribution.attributions import (
    ATTRIBUTION_FOLDER,
    NODES_FILE,
    PAIRS_FILE,
    PATHS_FILE,
    VERIFIED_FILE,
    VERIFIED_PAIRS_FILE,
    attribution_dataset,
)
from mi_pipe.attribution.config import AttributionConfig
from mi_pipe.attribution.methods import attribute, how_attributed, pair_tokens
from mi_pipe.attribution.nodes import Kind
from mi_pipe.attribution.pair_metric import PairMetric
from mi_pipe.attribution.path_patching import PathPatcher
from mi_pipe.attribution.ranking import Node, chosen_nodes, node_table
from mi_pipe.attribution.recording import check_watched_attention
from mi_pipe.attribution.verification import exact_effects, pair_values, rank_correlations, verified_table
from mi_pipe.core import atomic
from mi_pipe.core.manifest import Scalar
from mi_pipe.core.stage import Estimate, Stage
from mi_pipe.core.workspace import Workspace
from mi_pipe.models.model import Model
from mi_pipe.models.source import load_source
from mi_pipe.patching.assembly import pair_table, token_arrays
from mi_pipe.patching.chunks import Chunk
from mi_pipe.patching.metrics import find_metric
from stages.attribute_plan import Inputs, Plan, key_of, make_plan

__all__ = ["STAGE", "AttributionConfig", "Inputs"]

_FLOAT_BYTES = 4
_ROW_BYTES = 64
_TABLE_BYTES = 200_000


@dataclass(frozen=True)
class _Found:
    """Effects of all pairs, in the order of the plan's pairs, and the two runs' metrics."""

    effects: dict[Kind, np.ndarray]
    whole: dict[Kind, np.ndarray]
    base: np.ndarray
    clean: np.ndarray
    corrupted: np.ndarray

    @property
    def nodes(self) -> dict[Kind, np.ndarray]:
        """Effects of nodes at all positions; neurons have no others."""
        others: dict[Kind, np.ndarray] = {kind: value for kind, value in self.effects.items() if kind not in self.whole}
        return self.whole | others


def estimate(config: AttributionConfig, inputs: Inputs) -> Estimate:
    """Return the size of arrays and tables, and the number of units of work."""
    plan = make_plan(config, inputs)
    n_rows = len(plan.pairs) * sum(len(senders) for _, senders, _ in plan.paths)
    missing = [kind for kind in config.kinds if kind not in plan.kinds and "kinds" in config.model_fields_set]
    notes = (f"the model has no {', '.join(missing)}",) if missing else ()
    # Scratch holds every value once more.
    size = 2 * len(plan.pairs) * plan.n_values * _FLOAT_BYTES + n_rows * _ROW_BYTES + _TABLE_BYTES
    return Estimate(size, len(plan.keys), "batches", notes)


def run(config: AttributionConfig, inputs: Inputs, work: Workspace) -> dict[str, Scalar]:
    """Attribute, rank, verify, follow paths, and write; units in the ledger are not done again."""
    plan = make_plan(config, inputs)
    work.ledger.expect(len(plan.keys))
    is_done = all(key in work.ledger for key in plan.keys)
    model = None if is_done else load_source(inputs.model, config.device)
    for chunk in plan.chunks if model else ():
        _attribute_chunk(config, plan, model, chunk, work)
    found = _gathered(config, plan, work)
    table = node_table(found.nodes)
    nodes = chosen_nodes(table, config.verify)
    for chunk in plan.chunks if model else ():
        _verify_chunk(config, plan, model, chunk, nodes, work)
        _follow_paths(config, plan, model, chunk, work)
    _write_arrays(config, plan, inputs, work, found)
    work.write_table(NODES_FILE, table)
    correlations = _write_verified(plan, work, found, table, nodes)
    _write_paths(plan, work, found)
    return {
        "n_pairs": len(plan.pairs),
        "clean_metric": float(found.clean.mean()),
        "corrupted_metric": float(found.corrupted.mean()),
        "method": config.method,
        **strongest(table, correlations),
    }


def _attribute_chunk(config: AttributionConfig, plan: Plan, model: Model | None, chunk: Chunk, work: Workspace) -> None:
    key = key_of(chunk, "attribution")
    if key in work.ledger or model is None:
        return
    pairs = pair_tokens(model, chunk.group, config.direction)
    looks_into = any(kind in plan.kinds for kind in "qkv")
    error = check_watched_attention(model, pairs.base) if looks_into else 0.0
    metric = PairMetric.of(model, chunk.group, find_metric(config.metric))
    found = attribute(model, pairs, metric, plan.kinds, config)
    tensors = {f"effects.{kind}": value for kind, value in found.effects.items()}
    tensors |= {f"whole.{kind}": value for kind, value in found.whole.items()}
    tensors |= {"base": found.base, "donor": found.donor}
    _save(work, key, {name: _stored(value) for name, value in tensors.items()})
    _mark(plan, work, key, f"{config.method}, prompts of {chunk.group.n_pos} tokens", error=error)


def _verify_chunk(
    config: AttributionConfig, plan: Plan, model: Model | None, chunk: Chunk, nodes: Sequence[Node], work: Workspace
) -> None:
    key = key_of(chunk, "exact")
    if not plan.verifies or key in work.ledger or model is None:
        return
    metric = find_metric(config.metric)
    exact = exact_effects(model, chunk.group, config.direction, metric, nodes, config.batch_rows)
    _save(work, key, {"exact": exact})
    _mark(plan, work, key, f"exact patching of {len(nodes)} nodes")


def _follow_paths(config: AttributionConfig, plan: Plan, model: Model | None, chunk: Chunk, work: Workspace) -> None:
    for number, (path, senders, receivers) in enumerate(plan.paths):
        key = key_of(chunk, f"path{number}")
        if key in work.ledger or model is None:
            continue
        metric = PairMetric.of(model, chunk.group, find_metric(config.metric))
        patcher = PathPatcher(model, pair_tokens(model, chunk.group, config.direction), metric, path.mlps)
        found = patcher.patched(senders, receivers, config.batch_rows)
        _save(work, key, {"patched": _stored(found.patched)})
        _mark(plan, work, key, f"paths into {' '.join(path.receivers)}")


def _gathered(config: AttributionConfig, plan: Plan, work: Workspace) -> _Found:
    chunks = [_load(work, key_of(chunk, "attribution")) for chunk in plan.chunks]
    effects: dict[Kind, np.ndarray] = {
        kind: gather(kind, [chunk[f"effects.{kind}"] for chunk in chunks], plan.n_pos) for kind in plan.kinds
    }
    has_whole: list[Kind] = [kind for kind in plan.kinds if f"whole.{kind}" in chunks[0]]
    whole: dict[Kind, np.ndarray] = {
        kind: np.concatenate([chunk[f"whole.{kind}"] for chunk in chunks]) for kind in has_whole
    }
    base, donor = (np.concatenate([chunk[name] for chunk in chunks]) for name in ("base", "donor"))
    clean, corrupted = (donor, base) if config.direction == "denoising" else (base, donor)
    return _Found(effects, whole, base, clean, corrupted)


def _write_arrays(config: AttributionConfig, plan: Plan, inputs: Inputs, work: Workspace, found: _Found) -> None:
    attributes = how_attributed(config) | {
        "dtype": getattr(inputs.model, "dtype", "float32"), "model": inputs.model.id, "task": inputs.task.id,
    }  # fmt: skip
    tokens = token_arrays(plan.chunks, plan.n_pos)
    metrics = {"clean": found.clean, "corrupted": found.corrupted}
    dataset = attribution_dataset(found.effects, found.whole, metrics, tokens, plan.pairs, attributes)
    dataset.to_zarr(work.path(ATTRIBUTION_FOLDER), mode="w", zarr_format=3, consolidated=False)
    changed = np.concatenate([_first_change(chunk) for chunk in plan.chunks])
    work.write_table(PAIRS_FILE, pair_table(plan.chunks, inputs.task, found.clean, found.corrupted, changed))


def _write_verified(
    plan: Plan, work: Workspace, found: _Found, table: pd.DataFrame, nodes: Sequence[Node]
) -> dict[str, float]:
    if not plan.verifies or not nodes:
        return {}
    exact = np.concatenate([_load(work, key_of(chunk, "exact"))["exact"] for chunk in plan.chunks])
    estimates = np.stack([_of_node(found.nodes, node) for node in nodes], axis=1)
    verified = verified_table(table, nodes, estimates, exact)
    work.write_table(VERIFIED_FILE, verified)
    work.write_table(VERIFIED_PAIRS_FILE, pair_values(plan.pairs, nodes, estimates, exact))
    return rank_correlations(verified)


def _of_node(values: dict[Kind, np.ndarray], node: Node) -> np.ndarray:
    of_layer = values[node.kind][:, node.layer]
    return of_layer if node.index is None else of_layer[:, node.index]


def _write_paths(plan: Plan, work: Workspace, found: _Found) -> None:
    tables = [
        path_table(path, number, senders, plan.pairs, _patched(plan, work, number), found.base)
        for number, (path, senders, _) in enumerate(plan.paths)
    ]
    if tables:
        work.write_table(PATHS_FILE, pd.concat(tables, ignore_index=True))


def _patched(plan: Plan, work: Workspace, number: int) -> np.ndarray:
    return np.concatenate([_load(work, key_of(chunk, f"path{number}"))["patched"] for chunk in plan.chunks])


def _first_change(chunk: Chunk) -> np.ndarray:
    changed = (chunk.group.clean != chunk.group.corrupted).numpy()
    return np.where(changed.any(1), changed.argmax(1), chunk.group.n_pos).astype(np.int32)


def _mark(plan: Plan, work: Workspace, key: str, note: str, **info: float) -> None:
    work.ledger.mark(key, **info)
    work.progress.update(work.ledger.n_done, len(plan.keys), "batches", note)


def _stored(value: torch.Tensor) -> np.ndarray:
    return np.ascontiguousarray(value.detach().float().cpu().numpy())


def _save(work: Workspace, key: str, arrays: dict[str, np.ndarray]) -> None:
    with atomic.atomic_path(_file(work, key)) as temp:
        save_file(arrays, temp)


def _load(work: Workspace, key: str) -> dict[str, np.ndarray]:
    return load_file(_file(work, key))


def _file(work: Workspace, key: str) -> Path:
    return work.scratch / f"{key}.safetensors"


STAGE = Stage(name="attribute", version=2, config=AttributionConfig, inputs=Inputs, run=run, estimate=estimate)
