"""The artifact of the stage `attribute`: estimated effects of every node, pair by pair, exact ones of some, paths.

On disk `attribution.zarr` and tables (data/README.md, "attribute"). What a pair does not have, such as positions beyond
its length, is NaN, never zero.
"""

from collections.abc import Mapping
from functools import cached_property

import numpy as np
import pandas as pd
import xarray as xr

from mi_pipe.attribution.nodes import Kind, axes_of
from mi_pipe.core.artifact import Artifact
from mi_pipe.core.errors import ConfigError, near_names

ATTRIBUTION_FOLDER = "attribution.zarr"
PAIRS_FILE = "pairs.parquet"
NODES_FILE = "nodes.parquet"
VERIFIED_FILE = "verified.parquet"
VERIFIED_PAIRS_FILE = "verified_pairs.parquet"
PATHS_FILE = "paths.parquet"
WHOLE = "_whole"
"""Ends the names of arrays of nodes at all positions."""


class Attributions(Artifact):
    """Attribution of one task's metric to the nodes of a model."""

    @cached_property
    def _dataset(self) -> xr.Dataset:
        return xr.open_zarr(self.zarr_group(ATTRIBUTION_FOLDER), consolidated=False, chunks=None)

    def to_xarray(self) -> xr.Dataset:
        """Return everything: `<kind>` (pair, layer, head, pos), `<kind>_whole` without pos, `clean`, `corrupted`."""
        return self._dataset

    @property
    def kinds(self) -> list[str]:
        """The kinds of nodes."""
        return list(self._dataset.attrs["kinds"])

    @property
    def method(self) -> str:
        """atp, atp_qk_fix, atp_star, ig_inputs or ig_activations."""
        return self._dataset.attrs["method"]

    @property
    def direction(self) -> str:
        """`denoising` (clean into corrupted) or `noising`."""
        return self._dataset.attrs["direction"]

    @cached_property
    def pairs(self) -> pd.DataFrame:
        """One row a pair, with its length, both metrics, answer and token labels."""
        return self.read_table(PAIRS_FILE)

    def effects(self, kind: str, whole: bool = False) -> xr.DataArray:
        """Return the estimated m(patched) - m(base) of each pair and node, at each position or (`whole`) at all.

        Raises ConfigError if the kind was not asked for. Under atp_star values have no sign (GradDrop).
        """
        if kind not in self.kinds:
            raise ConfigError(
                f"{self.id} has no {kind!r}.{near_names(kind, self.kinds)} It has {', '.join(self.kinds)}."
            )
        is_apart = whole and f"{kind}{WHOLE}" in self._dataset
        return self._dataset[f"{kind}{WHOLE}" if is_apart else _array_of(kind)]

    def fraction(self, kind: str, whole: bool = True) -> xr.DataArray:
        """Return mean effects as fractions of the mean difference between donor and base run.

        It estimates what `PatchEffects.recovered` measures. Each cell's means run over the pairs that have it.
        """
        effects = self.effects(kind, whole)
        sign = 1 if self.direction == "denoising" else -1
        difference = (self._dataset["clean"] - self._dataset["corrupted"]) * sign
        return (effects.mean("pair") / difference.where(effects.notnull()).mean("pair")).rename(f"{kind}_fraction")

    def nodes(self) -> pd.DataFrame:
        """Return one row a node in attention and MLPs, at all positions: `mean`, `mean_abs`, `rank` in its kind."""
        return self.read_table(NODES_FILE)

    def verified(self) -> pd.DataFrame:
        """Return the nodes that were patched exactly, estimates and exact figures side by side (maybe none)."""
        return self._table(VERIFIED_FILE)

    def verified_pairs(self) -> pd.DataFrame:
        """Return estimate and exact effect of each of them, pair by pair."""
        return self._table(VERIFIED_PAIRS_FILE)

    def paths(self) -> pd.DataFrame:
        """Return one row a path, sender and pair: `receivers`, `mlps`, `sender`, `pair`, `patched`, `effect`."""
        return self._table(PATHS_FILE)

    def to_pandas(self, kind: str, whole: bool = False) -> pd.DataFrame:
        """Return one row a pair and node that was measured, with its effect."""
        frame = self.effects(kind, whole).to_dataframe(name="effect").reset_index()
        return frame.loc[frame["effect"].notna()].reset_index(drop=True)

    def _table(self, name: str) -> pd.DataFrame:
        return self.read_table(name) if name in self.manifest.files else pd.DataFrame()


def _array_of(kind: str) -> str:
    """Return the array of a kind: xarray takes one named like its axis for a coordinate."""
    return "neurons" if kind == "neuron" else kind


def attribution_dataset(
    effects: Mapping[Kind, np.ndarray],
    whole: Mapping[Kind, np.ndarray],
    per_pair: Mapping[str, np.ndarray],
    tokens: Mapping[str, np.ndarray],
    pairs: np.ndarray,
    attributes: Mapping[str, str | int],
) -> xr.Dataset:
    """Put the arrays together: by kind (pair, *axes), metrics (pair), tokens (pair, pos)."""
    variables: dict[str, tuple[tuple[str, ...], np.ndarray]] = {}
    for kind, array in effects.items():
        variables[_array_of(kind)] = (("pair", *axes_of(kind)), array)
    for kind, array in whole.items():
        axes = [axis for axis in axes_of(kind) if axis != "pos"]
        variables[f"{kind}{WHOLE}"] = (("pair", *axes), array)
    variables |= {name: (("pair",), array) for name, array in per_pair.items()}
    variables |= {name: (("pair", "pos"), array) for name, array in tokens.items()}
    dataset = xr.Dataset(variables, attrs={**attributes, "kinds": list(effects)})
    counted = [str(name) for name in dataset.sizes if name != "pair"]
    return dataset.assign_coords({"pair": pairs} | {n: np.arange(dataset.sizes[n], dtype=np.int32) for n in counted})
