"""Scores of feature ranges while a stage runs: parts on disk, each whole or absent, joined at the end.

<folder>/<sae>/<first feature>.figures    safetensors: density figures, histogram counts and edges
<folder>/<sae>/<first feature>.examples   Parquet: rows of `examples.parquet`
<folder>/<sae>/effects                    Parquet: rows of `logit_effects.parquet`
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float32, Int32
from safetensors.numpy import load_file, save_file

from mi_pipe.core.atomic import atomic_path
from mi_pipe.features.density import Density
from mi_pipe.features.tables import EXAMPLES_SCHEMA

_ROW_GROUP = 1 << 14
"""Rows of `examples.parquet` that a reader of one feature fetches together."""


@dataclass(frozen=True)
class Figures:
    """Density and histograms of successive features."""

    density: Density
    counts: Int32[np.ndarray, "feature bin"]
    edges: Float32[np.ndarray, "feature edge"]


class Parts:
    """The folder of parts."""

    def __init__(self, folder: Path) -> None:
        """Use `folder`, made when the first part is written."""
        self._folder = folder

    def write_range(self, sae: str, first: int, figures: Figures, examples: pa.Table) -> None:
        """Write durably what was found of the features from `first` on."""
        density = {field.name: getattr(figures.density, field.name) for field in fields(Density)}
        with atomic_path(self._path(sae, first, "figures")) as temp:
            save_file({**density, "counts": figures.counts, "edges": figures.edges}, temp)
        with atomic_path(self._path(sae, first, "examples")) as temp:
            pq.write_table(examples, temp)

    def write_effects(self, sae: str, effects: pd.DataFrame) -> None:
        """Write durably the logit effects of an SAE."""
        with atomic_path(self._folder / sae / "effects") as temp:
            effects.to_parquet(temp, index=False)

    def figures(self, sae: str, firsts: Sequence[int]) -> Figures:
        """Return the figures of all features of an SAE, from the ranges that begin at `firsts`."""
        parts = [load_file(self._path(sae, first, "figures")) for first in firsts]
        whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        counts, edges = whole.pop("counts"), whole.pop("edges")
        return Figures(Density(**whole), counts, edges)

    def join_examples(self, path: Path, firsts: Mapping[str, Sequence[int]]) -> int:
        """Write the examples of all SAEs to one file, a part at a time, and return their number."""
        n_rows = 0
        with atomic_path(path) as temp, pq.ParquetWriter(temp, EXAMPLES_SCHEMA, compression="zstd") as writer:
            for sae, starts in firsts.items():
                for first in starts:
                    table = pq.read_table(self._path(sae, first, "examples"))
                    writer.write_table(table, row_group_size=_ROW_GROUP)
                    n_rows += table.num_rows
        return n_rows

    def effects(self, saes: Sequence[str]) -> pd.DataFrame:
        """Return the logit effects of several SAEs."""
        return pd.concat([pd.read_parquet(self._folder / sae / "effects") for sae in saes], ignore_index=True)

    def _path(self, sae: str, first: int, kind: str) -> Path:
        return self._folder / sae / f"{first:09d}.{kind}"
