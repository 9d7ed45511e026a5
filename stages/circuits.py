"""Stage `circuits`: score every edge between heads and MLPs, and measure how far the best of them go.

Units of work, for each chunk of pairs: the two base runs, the edge scores (sums wait in scratch), and every circuit
of the faithfulness curve (metrics, one a pair, are in the ledger itself).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from mi_pipe.circuits.circuit_set import CIRCUIT_FILE, EDGES_FILE, FAITHFULNESS_FILE, NODES_FILE, PAIRS_FILE
from mi_pipe.circuits.config import CircuitsConfig
from mi_pipe.circuits.curve import (
    BaseMetrics,
    Candidate,
    candidates,
    choose_row,
    circuit_of,
    curve_sizes,
    curve_table,
    pair_table,
)
from mi_pipe.circuits.description import found_circuit, how_measured
from mi_pipe.circuits.eap import EdgeScores, score_edges
from mi_pipe.circuits.faithfulness import CircuitRunner, base_metrics
from mi_pipe.circuits.graph import Graph
from mi_pipe.circuits.parts import Parts, check_supported, find_parts
from mi_pipe.circuits.prune import EdgeMask
from mi_pipe.circuits.recording import Pairs
from mi_pipe.circuits.tables import edge_table, node_table, stored_scores
from mi_pipe.core import atomic
from mi_pipe.core.manifest import Scalar
from mi_pipe.core.stage import Estimate, Stage
from mi_pipe.core.workspace import Workspace
from mi_pipe.models.device import pick_device
from mi_pipe.models.source import ModelSource, load_source, source_hooks
from mi_pipe.patching.chunks import Chunk, check_fits, choose_pairs, chunks_of
from mi_pipe.prompts.prompt_set import PromptSet

__all__ = ["STAGE", "CircuitsConfig", "Inputs"]

_EDGE_BYTES = 32
_SUM_BYTES = 16
_OTHER_BYTES = 200_000


@dataclass(frozen=True)
class Inputs:
    """A model and the task whose circuit is sought."""

    model: ModelSource
    task: PromptSet


@dataclass(frozen=True)
class _Plan:
    """What will be done, known before any weight is read."""

    graph: Graph
    chunks: list[Chunk]
    candidates: list[Candidate]

    @cached_property
    def pairs(self) -> np.ndarray:
        return np.concatenate([chunk.group.pairs for chunk in self.chunks])

    @property
    def n_work(self) -> int:
        return len(self.chunks) * (2 + len(self.candidates))


def _plan(config: CircuitsConfig, inputs: Inputs) -> _Plan:
    pick_device(config.device)
    hooks, info = source_hooks(inputs.model)
    check_supported(hooks, info)
    graph = Graph.of(info)
    sizes = curve_sizes(graph, config.n_edges, config.fractions)
    groups = choose_pairs(inputs.task.pair_groups(), config.scores.max_pairs)
    check_fits(groups, info, inputs.task.id)
    return _Plan(graph, chunks_of(groups, config.batch_pairs), candidates(sizes, config.n_random, graph.n_edges))


def estimate(config: CircuitsConfig, inputs: Inputs) -> Estimate:
    """Return the size of the tables and of the sums in scratch, and the number of units of work."""
    plan = _plan(config, inputs)
    sums = len(plan.chunks) * plan.graph.n_writers * plan.graph.n_readers * _SUM_BYTES
    return Estimate(plan.graph.n_edges * _EDGE_BYTES + sums + _OTHER_BYTES, plan.n_work, "runs")


def run(config: CircuitsConfig, inputs: Inputs, work: Workspace) -> dict[str, Scalar]:
    """Score, select, run and write; units in the ledger are not done again."""
    plan = _plan(config, inputs)
    work.ledger.expect(plan.n_work)
    is_done = work.ledger.n_done >= plan.n_work
    parts = None if is_done else find_parts(load_source(inputs.model, config.device))
    if parts:
        _run_base(plan, parts, work)
    base = BaseMetrics(_gather(plan, work, "base", "clean"), _gather(plan, work, "base", "corrupted"))
    base.check()
    if parts:
        _score(config, plan, parts, work)
    scores = _load_scores(plan, work)
    means = stored_scores(scores)
    masks = {
        candidate: circuit_of(plan.graph, candidate, means, config.rank, config.selection, config.seed)
        for candidate in plan.candidates
    }
    if parts:
        _evaluate(plan, parts, masks, work)
    return _write(config, plan, inputs, base, scores, masks, work)


def _run_base(plan: _Plan, parts: Parts, work: Workspace) -> None:
    for chunk in plan.chunks:
        if _key(chunk, "base") not in work.ledger:
            clean, corrupted = base_metrics(parts, Pairs.of(chunk.group, parts.model.device))
            _mark(plan, work, _key(chunk, "base"), "base runs", clean=clean.tolist(), corrupted=corrupted.tolist())


def _score(config: CircuitsConfig, plan: _Plan, parts: Parts, work: Workspace) -> None:
    for chunk in plan.chunks:
        if _key(chunk, "scores") in work.ledger:
            continue
        pairs = Pairs.of(chunk.group, parts.model.device)
        sums = EdgeScores.of(score_edges(parts, pairs, config.scores.alphas))
        arrays = {"total": torch.from_numpy(sums.total), "total_squares": torch.from_numpy(sums.total_squares)}
        with atomic.atomic_path(work.scratch / f"{_key(chunk, 'scores')}.safetensors") as temp:
            save_file(arrays, temp)
        _mark(plan, work, _key(chunk, "scores"), f"scores, pairs {chunk.rows.start} to {chunk.rows.stop - 1}")


def _load_scores(plan: _Plan, work: Workspace) -> EdgeScores:
    sums: list[EdgeScores] = []
    for chunk in plan.chunks:
        arrays = load_file(work.scratch / f"{_key(chunk, 'scores')}.safetensors")
        sums.append(EdgeScores(arrays["total"].numpy(), arrays["total_squares"].numpy(), len(chunk.group.pairs)))
    return EdgeScores.summed(sums)


def _evaluate(plan: _Plan, parts: Parts, masks: Mapping[Candidate, EdgeMask], work: Workspace) -> None:
    for chunk in plan.chunks:
        todo = [candidate for candidate in plan.candidates if _key(chunk, candidate.name) not in work.ledger]
        if not todo:
            continue
        runner = CircuitRunner(parts, Pairs.of(chunk.group, parts.model.device))
        for candidate in todo:
            metric = runner.metric(masks[candidate]).tolist()
            _mark(plan, work, _key(chunk, candidate.name), f"{candidate.n_edges} edges", metric=metric)


def _write(
    config: CircuitsConfig,
    plan: _Plan,
    inputs: Inputs,
    base: BaseMetrics,
    scores: EdgeScores,
    masks: Mapping[Candidate, EdgeMask],
    work: Workspace,
) -> dict[str, Scalar]:
    metrics = {candidate: _gather(plan, work, candidate.name, "metric") for candidate in plan.candidates}
    table = curve_table(plan.graph, masks, metrics, base, config.n_resamples, config.seed)
    row, is_enough = choose_row(table, config.threshold)
    chosen = {str(name): value for name, value in table.iloc[row].items()}
    circuit = masks[Candidate(int(chosen["n_edges"]))]
    edges, nodes = edge_table(plan.graph, scores, circuit, config.rank), node_table(plan.graph, scores, circuit)
    work.write_table(EDGES_FILE, edges)
    work.write_table(NODES_FILE, nodes)
    work.write_table(FAITHFULNESS_FILE, table)
    work.write_table(PAIRS_FILE, pair_table(plan.pairs, metrics, base))
    model, task = inputs.model, inputs.task
    measured = {"model": model.id, "task": task.id, "dtype": getattr(model, "dtype", "float32")}
    measured |= {"n_pairs": len(plan.pairs), "graph_edges": plan.graph.n_edges} | how_measured(config)
    found = found_circuit(plan.graph, scores, circuit, nodes, chosen, is_enough)
    work.write_json(CIRCUIT_FILE, measured | found)
    strongest = edges.iloc[int(edges["rank"].argmin())]
    return {
        "n_pairs": len(plan.pairs),
        "clean_logit_diff": float(base.clean.mean()),
        "corrupted_logit_diff": float(base.corrupted.mean()),
        "graph_edges": plan.graph.n_edges,
        "circuit_edges": int(chosen["n_edges_pruned"]),
        "circuit_nodes": int(chosen["n_nodes"]),
        "faithfulness": float(chosen["faithfulness"]),
        "threshold_met": is_enough,
        "strongest_edge": f"{strongest['source']} -> {strongest['target']}",
        "strongest_score": float(strongest["score"]),
    }


def _gather(plan: _Plan, work: Workspace, unit: str, field: str) -> np.ndarray:
    return np.concatenate([np.array(work.ledger.info(_key(chunk, unit))[field]) for chunk in plan.chunks])


def _mark(plan: _Plan, work: Workspace, key: str, note: str, **info: Any) -> None:
    work.ledger.mark(key, **info)
    work.progress.update(work.ledger.n_done, plan.n_work, "runs", note)


def _key(chunk: Chunk, unit: str) -> str:
    """Name a unit by the pairs it covers, so that another batch size never takes it for its own."""
    return f"{chunk.group.n_pos}tokens.{chunk.rows.start}-{chunk.rows.stop}.{unit}"


STAGE = Stage(name="circuits", version=1, config=CircuitsConfig, inputs=Inputs, run=run, estimate=estimate)
