"""`circuit.json`: the reported circuit in a form that can be read without the tables, and how it was measured."""

from typing import Any

import numpy as np
import pandas as pd

from mi_pipe.circuits.config import CircuitsConfig
from mi_pipe.circuits.eap import EdgeScores
from mi_pipe.circuits.graph import Graph
from mi_pipe.circuits.prune import EdgeMask
from mi_pipe.circuits.tables import stored_scores


def how_measured(config: CircuitsConfig) -> dict[str, Any]:
    """Say what scores and faithfulness mean: method, direction, ablation, metric, aggregation, rules."""
    is_ig = config.scores.method == "eap_ig"
    return {
        "schema_name": "mi_pipe.circuit/1",
        "method": config.scores.method,
        "ig_steps": config.scores.ig_steps if is_ig else None,
        "ig_convention": config.scores.ig_convention if is_ig else None,
        "direction": "noising",
        "base_run": "clean",
        "ablation": "patch: an edge outside the circuit carries what it carries in the pair's corrupted run",
        "positions": "all together",
        "metric": "logit_diff at the last position",
        "score_aggregation": "mean over pairs of sums over positions",
        "faithfulness_aggregation": "ratio of means over pairs: "
        "(m(circuit) - m(corrupted)) / (m(clean) - m(corrupted))",
        "interval_kind": f"95% percentile bootstrap over pairs, {config.n_resamples} resamples",
        "rank": config.rank,
        "selection": config.selection,
        "prune_rule": "edges out of nodes without inputs and into readers without use are dropped until none is left",
        "choice": "smallest circuit of the curve with faithfulness of at least the threshold, else the largest",
        "threshold": config.threshold,
    }


def found_circuit(
    graph: Graph,
    scores: EdgeScores,
    circuit: EdgeMask,
    nodes: pd.DataFrame,
    row: dict[str, Any],
    threshold_met: bool,
) -> dict[str, Any]:
    """Return size, faithfulness, nodes and edges of the circuit at one row of the curve."""
    return {
        "n_edges_selected": int(row["n_edges"]),
        "n_edges": int(row["n_edges_pruned"]),
        "n_nodes": int(row["n_nodes"]),
        "faithfulness": float(row["faithfulness"]),
        "interval": [float(row["low"]), float(row["high"])],
        "threshold_met": threshold_met,
        "nodes": nodes.loc[nodes["in_circuit"], "node"].tolist(),
        "edges": circuit_edges(graph, scores, circuit),
    }


def circuit_edges(graph: Graph, scores: EdgeScores, circuit: EdgeMask) -> list[dict[str, Any]]:
    """Return the circuit's edges, strongest first; `feeds` are the nodes that compute with what the target reads."""
    means = stored_scores(scores)
    names = np.array([node.name for node in graph.writers], dtype=object)
    writers, readers = (index[circuit[graph.edge_indices]] for index in graph.edge_indices)
    order = np.argsort(-np.abs(means[writers, readers]), kind="stable")
    return [
        {
            "source": str(names[writer]),
            "target": graph.readers[reader].name,
            "feeds": names[graph.feeds[reader]].tolist(),
            "score": float(means[writer, reader]),
        }
        for writer, reader in zip(writers[order], readers[order], strict=True)
    ]
