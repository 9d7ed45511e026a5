"""From edge scores to a circuit: the edges kept, and the nodes without which nothing would change dropped.

Selection of n edges:
- "top": the n best of all edges;
- "greedy": from the logits backward, each time the best edge into a node that is already reached (as in EAP-IG's
  `apply_greedy`), so that every edge leads to the logits.
Best is the largest |score| ("absolute") or the most negative ("signed": edges whose corruption lowers the metric
most). Ties go by the order of the graph's edges.

Pruning then repeatedly drops the edges out of nodes that no kept edge enters and those into readers that feed
nothing kept. A head is entered through its q or its group's k or v. What is dropped so cannot change what the circuit
computes: a writer without inputs writes what it wrote in the corrupted run.
"""

import heapq
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Int

from mi_pipe.circuits.graph import Graph

Rank = Literal["absolute", "signed"]
Selection = Literal["top", "greedy"]
EdgeMask = Bool[np.ndarray, "writer reader"]


def edge_keys(graph: Graph, scores: Float[np.ndarray, "writer reader"], rank: Rank) -> Float[np.ndarray, " edge"]:
    """Return what edges are ranked by, larger first, in the order of the graph's edges."""
    values = scores[graph.edge_indices]
    return np.abs(values) if rank == "absolute" else -values


def ranking(graph: Graph, scores: Float[np.ndarray, "writer reader"], rank: Rank) -> Int[np.ndarray, " edge"]:
    """Return the edges, best first, as positions in the graph's edges."""
    return np.argsort(-edge_keys(graph, scores, rank), kind="stable")


def select_edges(
    graph: Graph, scores: Float[np.ndarray, "writer reader"], n_edges: int, rank: Rank, selection: Selection
) -> EdgeMask:
    """Return the n best edges (fewer if "greedy" reaches fewer), not yet pruned."""
    if selection == "greedy":
        chosen = _greedy(graph, edge_keys(graph, scores, rank), n_edges)
    else:
        chosen = ranking(graph, scores, rank)[:n_edges]
    writers, readers = graph.edge_indices
    mask = np.zeros_like(graph.edge_mask)
    mask[writers[chosen], readers[chosen]] = True
    return mask


def _greedy(graph: Graph, keys: Float[np.ndarray, " edge"], n_edges: int) -> list[int]:
    writers, _ = graph.edge_indices
    into = np.split(np.arange(graph.n_edges), np.cumsum(graph.n_sources)[:-1])
    reached = {graph.n_readers - 1}
    frontier = [(-keys[edge], int(edge)) for edge in into[graph.n_readers - 1]]
    heapq.heapify(frontier)
    chosen: list[int] = []
    while frontier and len(chosen) < n_edges:
        edge = heapq.heappop(frontier)[1]
        chosen.append(edge)
        for reader in np.flatnonzero(graph.feeds[:, writers[edge]]):
            if int(reader) not in reached:
                reached.add(int(reader))
                for candidate in into[reader]:
                    heapq.heappush(frontier, (-keys[candidate], int(candidate)))
    return chosen


def prune(graph: Graph, mask: EdgeMask) -> EdgeMask:
    """Drop edges from writers without inputs and into readers that feed nothing, until none is left to drop."""
    while True:
        has_input = np.any(mask, axis=0) @ graph.feeds
        has_input[0] = True  # the embedding
        has_use = graph.feeds @ np.any(mask, axis=1)
        has_use[-1] = True  # the logits
        kept = mask & has_input[:, None] & has_use[None, :]
        if kept.sum() == mask.sum():
            return kept
        mask = kept
