"""The tables of an artifact: every edge with its score, and every node."""

from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from mi_pipe.circuits.eap import EdgeScores
from mi_pipe.circuits.graph import Graph, Node
from mi_pipe.circuits.prune import EdgeMask, Rank, ranking


def stored_scores(scores: EdgeScores) -> Float[np.ndarray, "writer reader"]:
    """Return the mean scores in the precision in which they are stored, so that a ranking can be redone."""
    return scores.mean.astype(np.float32)


def edge_table(graph: Graph, scores: EdgeScores, circuit: EdgeMask, rank: Rank) -> pd.DataFrame:
    """Return one row an edge, by reader and then writer."""
    writers, readers = graph.edge_indices
    means = stored_scores(scores)
    order = np.empty(graph.n_edges, np.int32)
    order[ranking(graph, means, rank)] = np.arange(graph.n_edges, dtype=np.int32)
    return pd.DataFrame({
        "source": np.array([node.name for node in graph.writers], dtype=object)[writers],
        "target": np.array([node.name for node in graph.readers], dtype=object)[readers],
        "kind": np.array([node.kind for node in graph.readers], dtype=object)[readers],
        "score": means[writers, readers],
        "standard_error": scores.standard_error.astype(np.float32)[writers, readers],
        "rank": order,
        "in_circuit": circuit[writers, readers],
    })  # fmt: skip


def node_table(graph: Graph, scores: EdgeScores, circuit: EdgeMask) -> pd.DataFrame:
    """Return one row a node: embed, heads, shared key/value heads, MLPs, logits.

    `score` is the sum of a writer's edges' scores: the estimated effect of corrupting all that it writes.
    `n_in` and `n_out` count edges of the circuit; those into a shared k or v count for each head of the group.
    """
    score = scores.mean.sum(axis=1)
    entering, leaving = circuit.sum(axis=0), circuit.sum(axis=1)
    rows = [
        _row(graph, node, score[i], int(entering @ graph.feeds[:, i]), int(leaving[i]))
        for i, node in enumerate(graph.writers)
    ]
    rows += _shared_rows(graph, circuit)
    rows.append(_row(graph, graph.readers[-1], np.nan, int(entering[-1]), 0))
    table = pd.DataFrame(rows).astype({"layer": "Int32", "head": "Int32", "score": np.float32})
    table["in_circuit"] = (table["n_in"] + table["n_out"]) > 0
    return table.astype({"n_in": np.int32, "n_out": np.int32})


def _row(graph: Graph, node: Node, score: float, n_in: int, n_out: int) -> dict[str, Any]:
    shared = None
    if node.kind == "head" and graph.n_kv_heads != graph.n_heads and node.head is not None:
        shared = f"a{node.layer}.kv{node.head * graph.n_kv_heads // graph.n_heads}"
    return {
        "node": node.name,
        "kind": node.kind,
        "layer": node.layer,
        "head": node.head,
        "kv_node": shared,
        "score": score,
        "n_in": n_in,
        "n_out": n_out,
    }


def _shared_rows(graph: Graph, circuit: EdgeMask) -> list[dict[str, Any]]:
    """Return the key/value heads that several heads share; they are read into and write nothing themselves."""
    if graph.n_kv_heads == graph.n_heads:
        return []
    entering = circuit.sum(axis=0)
    rows: list[dict[str, Any]] = []
    for layer in range(graph.n_layers):
        for head in range(graph.n_kv_heads):
            name = f"a{layer}.kv{head}"
            n_in = sum(int(entering[graph.reader_names[f"{name}.{kind}"]]) for kind in "kv")
            node = {"node": name, "kind": "kv", "layer": layer, "head": head, "kv_node": None}
            rows.append(node | {"score": np.nan, "n_in": n_in, "n_out": 0})
    return rows
