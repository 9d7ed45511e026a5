"""The faithfulness curve: which circuits are run, and what is read off their metrics.

Circuits of growing size from one ranking, and beside them random ones: the same selection and pruning, of the same
number of edges, with uniform random numbers for scores.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from mi_pipe.circuits.faithfulness import bootstrap_interval, normalised_faithfulness
from mi_pipe.circuits.graph import Graph
from mi_pipe.circuits.prune import EdgeMask, Rank, Selection, prune, select_edges
from mi_pipe.core.errors import ConfigError, StageError

FRACTIONS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""Shares of all edges that MIB (Mueller et al. 2025) measures."""
_NEGLIGIBLE = 1e-6


@dataclass(frozen=True)
class Candidate:
    """One circuit of the curve."""

    n_edges: int
    """Edges selected, before pruning."""
    draw: int | None = None
    """Number of the random ranking, or None for the ranking by score."""

    @property
    def name(self) -> str:
        """Name of its unit of work."""
        return f"scored.{self.n_edges}" if self.draw is None else f"random{self.draw}.{self.n_edges}"


@dataclass(frozen=True)
class BaseMetrics:
    """The metric of every pair in the two runs that faithfulness is measured against."""

    clean: Float[np.ndarray, " pair"]
    corrupted: Float[np.ndarray, " pair"]

    def check(self) -> None:
        """Raise StageError if the two runs do not differ, so that faithfulness means nothing."""
        gap = abs(self.clean.mean() - self.corrupted.mean())
        if gap <= _NEGLIGIBLE * max(1.0, abs(self.clean.mean())):
            raise StageError(
                f"Clean and corrupted prompts have the same logit difference ({self.clean.mean():.4g}), so there is no "
                "effect to find a circuit for. Use a task that the model can do, or other corrupted prompts."
            )


def curve_sizes(graph: Graph, n_edges: Sequence[int] | None, fractions: Sequence[float]) -> list[int]:
    """Return the sizes of the curve, ascending: as given, or the fractions of all edges, rounded up.

    Raises ConfigError if a size is larger than the graph.
    """
    sizes = n_edges or [int(np.ceil(fraction * graph.n_edges - _NEGLIGIBLE)) for fraction in fractions]
    if max(sizes) > graph.n_edges:
        raise ConfigError(f"n_edges: {max(sizes)} is more than the {graph.n_edges} edges that the model's graph has.")
    return sorted(set(sizes))


def candidates(sizes: Sequence[int], n_random: int, n_all: int) -> list[Candidate]:
    """Return the circuits of the curve; the whole graph has no random counterpart."""
    random = [Candidate(size, draw) for draw in range(n_random) for size in sizes if size < n_all]
    return [Candidate(size) for size in sizes] + random


def circuit_of(
    graph: Graph,
    candidate: Candidate,
    scores: Float[np.ndarray, "writer reader"],
    rank: Rank,
    selection: Selection,
    seed: int,
) -> EdgeMask:
    """Return the pruned edges of one circuit of the curve."""
    if candidate.draw is not None:
        scores, rank = np.random.default_rng([seed, candidate.draw]).random(scores.shape), "absolute"
    return prune(graph, select_edges(graph, scores, candidate.n_edges, rank, selection))


def n_nodes(graph: Graph, mask: EdgeMask) -> int:
    """Return how many of embed, heads, MLPs and logits have an edge in a pruned circuit."""
    writers = np.any(mask, axis=1) | (np.any(mask, axis=0) @ graph.feeds)
    return int(writers.sum() + np.any(mask[:, -1]))


def curve_table(
    graph: Graph,
    masks: Mapping[Candidate, EdgeMask],
    metrics: Mapping[Candidate, Float[np.ndarray, " pair"]],
    base: BaseMetrics,
    n_resamples: int,
    seed: int,
) -> pd.DataFrame:
    """Return one row a size: metric and faithfulness of the circuit with its 95% interval, and of random circuits."""
    return pd.DataFrame([
        {
            "n_edges": candidate.n_edges,
            "fraction": candidate.n_edges / graph.n_edges,
            "n_edges_pruned": int(masks[candidate].sum()),
            "n_nodes": n_nodes(graph, masks[candidate]),
            "metric": float(values.mean()),
            "faithfulness": normalised_faithfulness(values, base.clean, base.corrupted),
            **_interval(values, base, n_resamples, seed),
            **_random_baseline(candidate.n_edges, metrics, base),
        }
        for candidate, values in metrics.items()
        if candidate.draw is None
    ]).astype({"n_edges": np.int32, "n_edges_pruned": np.int32, "n_nodes": np.int32})  # fmt: skip


def _interval(values: np.ndarray, base: BaseMetrics, n_resamples: int, seed: int) -> dict[str, float]:
    low, high = bootstrap_interval(values, base.clean, base.corrupted, n_resamples, seed)
    return {"low": low, "high": high}


def _random_baseline(
    size: int, metrics: Mapping[Candidate, Float[np.ndarray, " pair"]], base: BaseMetrics
) -> dict[str, float]:
    found = [
        values for candidate, values in metrics.items() if candidate.n_edges == size and candidate.draw is not None
    ]
    if not found:
        return {"random_metric": np.nan, "random_faithfulness": np.nan}
    return {
        "random_metric": float(np.mean(found)),
        "random_faithfulness": float(np.mean([normalised_faithfulness(x, base.clean, base.corrupted) for x in found])),
    }


def pair_table(
    pairs: Int[np.ndarray, " pair"], metrics: Mapping[Candidate, Float[np.ndarray, " pair"]], base: BaseMetrics
) -> pd.DataFrame:
    """Return the metric of every pair in every run: `run` is clean, corrupted, circuit or random."""
    runs = [("clean", -1, -1, base.clean), ("corrupted", -1, -1, base.corrupted)]
    for candidate, values in metrics.items():
        kind = "circuit" if candidate.draw is None else "random"
        runs.append((kind, -1 if candidate.draw is None else candidate.draw, candidate.n_edges, values))
    frames = [
        pd.DataFrame({"run": run, "draw": draw, "n_edges": size, "pair": pairs, "metric": values})
        for run, draw, size, values in runs
    ]
    types = {"draw": np.int32, "n_edges": np.int32, "pair": np.int32, "metric": np.float32}
    return pd.concat(frames, ignore_index=True).astype(types)


def choose_row(table: pd.DataFrame, threshold: float) -> tuple[int, bool]:
    """Return the row of the smallest circuit with at least this faithfulness, else of the largest; and if it has it."""
    enough = np.flatnonzero(table["faithfulness"].to_numpy() >= threshold)
    return (int(enough[0]), True) if len(enough) else (len(table) - 1, False)
