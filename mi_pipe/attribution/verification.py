"""Exact patching of chosen nodes by the engine of `patching`, and how well estimates agree with it."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float

from mi_pipe.attribution.ranking import Node
from mi_pipe.models.info import ModelInfo
from mi_pipe.models.model import Model
from mi_pipe.patching.engine import make_engine
from mi_pipe.patching.metrics import Direction, Metric
from mi_pipe.patching.patches import Patches
from mi_pipe.patching.runs import run_pairs
from mi_pipe.patching.units import Unit, hook_of
from mi_pipe.prompts.prompt_set import PairGroup

_UNITS: dict[str, Unit] = {"z": "head_out"}
_FEWEST = 3
"""A rank correlation of fewer nodes says nothing."""


@torch.no_grad()
def exact_effects(
    model: Model, group: PairGroup, direction: Direction, metric: Metric, nodes: Sequence[Node], batch_rows: int = 64
) -> Float[np.ndarray, "pair node"]:
    """Return m(patched) - m(base) with each node alone patched, at all positions; float32."""
    by_hook: dict[str, list[int]] = {}
    for i, node in enumerate(nodes):
        by_hook.setdefault(hook_of(_unit(node), node.layer), []).append(i)
    out = np.zeros((group.n_pairs, len(nodes)), np.float32)
    for hook, indices in by_hook.items():
        # One hook point's donor values at a time are in memory.
        runs = run_pairs(model, group, direction, [hook], metric)
        engine, _ = make_engine(model, runs)
        device, pairs = runs.tokens.device, torch.arange(group.n_pairs)
        rows = pairs.repeat(len(indices)).to(device)
        node = nodes[indices[0]]
        part = None
        if node.index is not None:
            part = torch.tensor([nodes[i].index for i in indices], device=device).repeat_interleave(group.n_pairs)
        first_pos = min(int(runs.first_change.min()), runs.n_pos - 1)
        found = []
        for start in range(0, len(rows), batch_rows):
            some = slice(start, start + batch_rows)
            parts = None if part is None else part[some]
            found.append(
                engine.patched_metric(Patches(hook, rows[some], parts, _width(node, model.info), None, first_pos))
            )
        change = torch.cat(found).view(len(indices), -1).T - runs.base_metric[:, None]
        out[:, indices] = change.float().cpu().numpy()
    return out


def _unit(node: Node) -> Unit:
    return _UNITS.get(node.kind, node.kind)  # pyright: ignore[reportReturnType]


def _width(node: Node, info: ModelInfo) -> int:
    return 1 if node.kind == "neuron" else info.d_head


def verified_table(
    table: pd.DataFrame,
    nodes: Sequence[Node],
    estimates: Float[np.ndarray, "pair node"],
    exact: Float[np.ndarray, "pair node"],
) -> pd.DataFrame:
    """Return the rows of `table` of these nodes with exact figures beside: `exact_mean`, `exact_mean_abs`,
    `exact_standard_error`, and `pair_correlation` of estimate and exact value over pairs.
    """
    chosen = table.set_index("node").loc[[node.name for node in nodes]].reset_index()
    n_pairs = len(exact)
    error = exact.std(0, ddof=1) / np.sqrt(n_pairs) if n_pairs > 1 else np.full(len(nodes), np.nan)
    return chosen.assign(
        exact_mean=exact.mean(0).astype(np.float32),
        exact_mean_abs=np.abs(exact).mean(0).astype(np.float32),
        exact_standard_error=error.astype(np.float32),
        pair_correlation=[_correlation(estimates[:, i], exact[:, i]) for i in range(len(nodes))],
    ).sort_values(["kind", "rank"], ignore_index=True)  # fmt: skip


def rank_correlations(verified: pd.DataFrame) -> dict[str, float]:
    """Return, by kind, Spearman's rank correlation of mean absolute estimates and mean absolute exact effects."""
    found: dict[str, float] = {}
    for kind, rows in verified.groupby("kind", sort=True):
        if len(rows) >= _FEWEST:
            found[str(kind)] = spearman(rows["mean_abs"].to_numpy(), rows["exact_mean_abs"].to_numpy())
    return found


def spearman(one: Float[np.ndarray, " n"], other: Float[np.ndarray, " n"]) -> float:
    """Return the correlation of ranks, ties at their mean rank; NaN where one of them does not vary.

    >>> spearman(np.array([1.0, 2.0, 3.0, 4.0]), np.array([1.0, 4.0, 9.0, 2.0]))
    0.4
    """
    ranks = [pd.Series(values).rank().to_numpy() for values in (one, other)]
    return round(_correlation(*ranks), 12)


def _correlation(one: np.ndarray, other: np.ndarray) -> float:
    if len(one) <= 1 or one.std() == 0 or other.std() == 0:
        return float("nan")
    return float(np.corrcoef(one, other)[0, 1])


def pair_values(
    pairs: np.ndarray,
    nodes: Sequence[Node],
    estimates: Float[np.ndarray, "pair node"],
    exact: Float[np.ndarray, "pair node"],
) -> pd.DataFrame:
    """Return one row a node and pair: `node`, `pair`, `estimate`, `exact`."""
    return pd.DataFrame({
        "node": np.repeat([node.name for node in nodes], len(pairs)),
        "pair": np.tile(pairs.astype(np.int32), len(nodes)),
        "estimate": estimates.T.reshape(-1).astype(np.float32),
        "exact": exact.T.reshape(-1).astype(np.float32),
    })  # fmt: skip
