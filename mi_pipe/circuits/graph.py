"""The computational graph of a decoder-only transformer at the level of heads and MLPs.

Writers add to the residual stream: the embedding, every attention head, every MLP. Readers take their input
from it, before their block's normalisation: q of every head, k and v of every key/value head, every MLP, the
logits. An edge goes from a writer to each later reader. Writers are in the order in which the model computes
them, so that what a reader sees is always a prefix of them. In a parallel block the MLP reads what the
heads of its layer read, and so does not see them.

Sizes: 1 + L(H + 1) writers and L(3H + 1) + 1 readers without grouped queries; GPT-2 small has 32,491 edges.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from jaxtyping import Bool, Int

from mi_pipe.models.info import ModelInfo

NodeKind = Literal["embed", "head", "mlp", "q", "k", "v", "logits"]


@dataclass(frozen=True)
class Node:
    """A writer (embed, head, mlp) or a reader (q, k, v, mlp, logits)."""

    name: str
    kind: NodeKind
    layer: int | None = None
    head: int | None = None
    """Head of a writer or of q; key/value head of k and v."""


@dataclass(frozen=True)
class Graph:
    """All writers, readers and edges of one model.

    >>> graph = Graph(n_layers=12, n_heads=12, n_kv_heads=12)
    >>> graph.n_writers, graph.n_edges
    (157, 32491)
    """

    n_layers: int
    n_heads: int
    n_kv_heads: int
    has_mlp: bool = True
    is_parallel: bool = False

    @classmethod
    def of(cls, info: ModelInfo) -> "Graph":
        """Return the graph of a model with these sizes."""
        return cls(info.n_layers, info.n_heads, info.n_kv_heads, not info.attn_only, info.parallel_attn_mlp)

    @cached_property
    def writers(self) -> tuple[Node, ...]:
        """The embedding, then of each layer its heads and its MLP."""
        return tuple(self._walk_writers())

    @cached_property
    def readers(self) -> tuple[Node, ...]:
        """Of each layer q of every head, k and v of every key/value head and the MLP; at last the logits."""
        return tuple(self._walk_readers())

    @property
    def n_writers(self) -> int:
        """Number of writers."""
        return len(self.writers)

    @property
    def n_readers(self) -> int:
        """Number of readers."""
        return len(self.readers)

    @property
    def n_edges(self) -> int:
        """Number of edges."""
        return int(self.n_sources.sum())

    @property
    def writers_per_layer(self) -> int:
        """Heads of a layer, and its MLP if there is one."""
        return self.n_heads + self.has_mlp

    @property
    def projections_per_layer(self) -> int:
        """Readers of a layer's attention: n_heads of q, n_kv_heads of k and as many of v, in this order."""
        return self.n_heads + 2 * self.n_kv_heads

    def first_head(self, layer: int) -> int:
        """Index of the first head of a layer among the writers; its other heads and its MLP follow."""
        return 1 + layer * self.writers_per_layer

    def mlp_writer(self, layer: int) -> int:
        """Index of a layer's MLP among the writers."""
        return self.first_head(layer) + self.n_heads

    def first_projection(self, layer: int) -> int:
        """Index of a layer's first q among the readers; its other projections and its MLP follow."""
        return layer * (self.projections_per_layer + self.has_mlp)

    def mlp_reader(self, layer: int) -> int:
        """Index of a layer's MLP among the readers."""
        return self.first_projection(layer) + self.projections_per_layer

    @cached_property
    def n_sources(self) -> Int[np.ndarray, " reader"]:
        """How many writers, from the first on, each reader sees."""
        return np.array([self._sees(reader) for reader in self.readers], dtype=np.int64)

    @cached_property
    def edge_mask(self) -> Bool[np.ndarray, "writer reader"]:
        """Which pairs are edges."""
        return np.arange(self.n_writers)[:, None] < self.n_sources[None, :]

    @cached_property
    def edge_indices(self) -> tuple[Int[np.ndarray, " edge"], Int[np.ndarray, " edge"]]:
        """Writer and reader of each edge, by reader and then writer: the order of every table of edges."""
        reader, writer = np.nonzero(self.edge_mask.T)
        return writer, reader

    @cached_property
    def feeds(self) -> Bool[np.ndarray, "reader writer"]:
        """Which writers compute with what a reader reads: a shared k or v feeds all heads of its group."""
        pairs = np.zeros((self.n_readers, self.n_writers), dtype=bool)
        group = self.n_heads // self.n_kv_heads
        for i, reader in enumerate(self.readers):
            if reader.layer is None:
                continue
            first = self.first_head(reader.layer)
            if reader.head is None:
                pairs[i, self.mlp_writer(reader.layer)] = True
            elif reader.kind == "q":
                pairs[i, first + reader.head] = True
            else:
                pairs[i, first + reader.head * group : first + (reader.head + 1) * group] = True
        return pairs

    @cached_property
    def names(self) -> dict[str, int]:
        """Index of each writer by name."""
        return {node.name: i for i, node in enumerate(self.writers)}

    @cached_property
    def reader_names(self) -> dict[str, int]:
        """Index of each reader by name."""
        return {node.name: i for i, node in enumerate(self.readers)}

    def _walk_writers(self) -> Iterator[Node]:
        yield Node("embed", "embed")
        for layer in range(self.n_layers):
            for head in range(self.n_heads):
                yield Node(f"a{layer}.h{head}", "head", layer, head)
            if self.has_mlp:
                yield Node(f"m{layer}", "mlp", layer)

    def _walk_readers(self) -> Iterator[Node]:
        # Under grouped queries a key/value head is not a head: it gets a name of its own.
        shared = "kv" if self.n_kv_heads != self.n_heads else "h"
        for layer in range(self.n_layers):
            for head in range(self.n_heads):
                yield Node(f"a{layer}.h{head}.q", "q", layer, head)
            for head in range(self.n_kv_heads):
                yield Node(f"a{layer}.{shared}{head}.k", "k", layer, head)
            for head in range(self.n_kv_heads):
                yield Node(f"a{layer}.{shared}{head}.v", "v", layer, head)
            if self.has_mlp:
                yield Node(f"m{layer}", "mlp", layer)
        yield Node("logits", "logits")

    def _sees(self, reader: Node) -> int:
        if reader.layer is None:
            return self.n_writers
        sees_heads = reader.kind == "mlp" and not self.is_parallel
        return self.first_head(reader.layer) + (self.n_heads if sees_heads else 0)
