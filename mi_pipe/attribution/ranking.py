"""Nodes of attention and MLPs in the order of their estimated effects, and which of them are patched exactly."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Float

from mi_pipe.attribution.config import VerifyConfig
from mi_pipe.attribution.nodes import IN_BRANCH, Kind


@dataclass(frozen=True)
class Node:
    """A node at all positions."""

    kind: Kind
    layer: int
    index: int | None = None
    """Head, key/value head (k, v) or neuron; None where a layer has one node of the kind."""

    @property
    def name(self) -> str:
        """Its name.

        >>> Node("z", 3, 5).name, Node("mlp_out", 3).name
        ('z.3.5', 'mlp_out.3')
        """
        return f"{self.kind}.{self.layer}" + ("" if self.index is None else f".{self.index}")


def nodes_of(kind: Kind, value: Float[np.ndarray, "pair layer *index"]) -> Iterator[Node]:
    """Yield the nodes of a kind in the order of the flattened values of a pair."""
    for place in np.ndindex(value.shape[1:]):
        yield Node(kind, *place)


def node_table(whole: Mapping[Kind, Float[np.ndarray, "pair layer *index"]]) -> pd.DataFrame:
    """Return one row a node that lies within a layer's attention or MLP, by kind.

    `mean` and `mean_abs` of its effects over pairs, `standard_error` of the mean, and `rank` by mean_abs within its
    kind, 0 the largest (Kramár et al. 2024 rank so: effects of both signs count).
    """
    tables = [_table(kind, whole[kind]) for kind in IN_BRANCH if kind in whole]
    return pd.concat(tables or [_table("z", np.zeros((1, 0, 0), np.float32))], ignore_index=True)


def _table(kind: Kind, value: Float[np.ndarray, "pair layer *index"]) -> pd.DataFrame:
    nodes = list(nodes_of(kind, value))
    flat = value.reshape(len(value), -1).astype(np.float64)
    mean_abs = np.abs(flat).mean(0)
    rank = np.empty(len(nodes), np.int32)
    rank[np.argsort(-mean_abs, kind="stable")] = np.arange(len(nodes), dtype=np.int32)
    error = flat.std(0, ddof=1) / np.sqrt(len(flat)) if len(flat) > 1 else np.full(len(nodes), np.nan)
    return pd.DataFrame({
        "node": [node.name for node in nodes],
        "kind": kind,
        "layer": np.array([node.layer for node in nodes], np.int32),
        "index": pd.array([node.index for node in nodes], dtype="Int32"),
        "mean": flat.mean(0).astype(np.float32),
        "mean_abs": mean_abs.astype(np.float32),
        "standard_error": error.astype(np.float32),
        "rank": rank,
    })  # fmt: skip


def chosen_nodes(table: pd.DataFrame, verify: VerifyConfig) -> list[Node]:
    """Return which nodes are patched exactly: of each kind the top ones, and random ones of the others."""
    chosen: list[Node] = []
    for number, (_, of_kind) in enumerate(table.groupby("kind", sort=True)):
        ordered = of_kind.sort_values("rank")
        top, rest = ordered.head(verify.top), ordered.iloc[verify.top :]
        n_random = min(verify.random, len(rest)) if verify.top else 0
        picked = np.random.default_rng([verify.seed, number]).permutation(len(rest))[:n_random]
        chosen += map(_node, pd.concat([top, rest.iloc[np.sort(picked)]]).to_dict("records"))
    return chosen


def _node(row: Mapping[str, object]) -> Node:
    index = row["index"]
    return Node(row["kind"], int(str(row["layer"])), None if pd.isna(index) else int(str(index)))  # pyright: ignore[reportArgumentType, reportGeneralTypeIssues, reportCallIssue]
