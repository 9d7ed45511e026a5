"""The read side of the stage `circuits`: edge scores, the circuit, and how faithful circuits of each size are."""

from typing import Any

import pandas as pd

from mi_pipe.core.artifact import Artifact

EDGES_FILE = "edges.parquet"
NODES_FILE = "nodes.parquet"
FAITHFULNESS_FILE = "faithfulness.parquet"
PAIRS_FILE = "faithfulness_pairs.parquet"
CIRCUIT_FILE = "circuit.json"


class CircuitSet(Artifact):
    """Edge scores of one task, a circuit pruned from them, and its faithfulness curve."""

    def edges(self, in_circuit: bool = False) -> pd.DataFrame:
        """Return `source`, `target`, `kind`, `score`, `standard_error`, `rank`, `in_circuit`: all, or the circuit's.

        A score is the estimated change of the metric when the edge alone carries the corrupted run; rank 0 is best.
        """
        table = self.read_table(EDGES_FILE)
        return table.query("in_circuit").sort_values("rank", ignore_index=True) if in_circuit else table

    def nodes(self, in_circuit: bool = False) -> pd.DataFrame:
        """Return one row a node (embed, heads, shared key/value heads, MLPs, logits): all, or the circuit's."""
        table = self.read_table(NODES_FILE)
        return table.query("in_circuit").reset_index(drop=True) if in_circuit else table

    def faithfulness(self) -> pd.DataFrame:
        """Return one row a size: `metric`, `faithfulness` with its 95% interval, and random circuits' means."""
        return self.read_table(FAITHFULNESS_FILE)

    def pair_metrics(self) -> pd.DataFrame:
        """Return the metric of every pair in every run (clean, corrupted, circuit, random)."""
        return self.read_table(PAIRS_FILE)

    def circuit(self) -> dict[str, Any]:
        """Return the circuit: its edges, its faithfulness, how it was chosen, and how everything was measured."""
        return self.read_json(CIRCUIT_FILE)
