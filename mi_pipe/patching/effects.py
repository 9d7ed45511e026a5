"""The artifact of the stage `patch`: what each single patch does to the metric, pair by pair.

On disk `effects.zarr` and `pairs.parquet` (data/README.md, "patch"). Cells that were not measured are NaN,
never zero: positions beyond a pair's length, units that the model does not have are absent.
"""

from collections.abc import Mapping
from functools import cached_property

import numpy as np
import pandas as pd
import xarray as xr

from mi_pipe.core.artifact import Artifact
from mi_pipe.core.errors import ConfigError, near_names
from mi_pipe.patching.metrics import effect_fraction
from mi_pipe.patching.sweep import Unit

EFFECTS_FOLDER = "effects.zarr"
PAIRS_FILE = "pairs.parquet"
_BY_HEAD = "head_out"


class PatchEffects(Artifact):
    """Activation patching of one task."""

    @cached_property
    def _dataset(self) -> xr.Dataset:
        return xr.open_zarr(self.zarr_group(EFFECTS_FOLDER), consolidated=False, chunks=None)

    def to_xarray(self) -> xr.Dataset:
        """Return everything: a unit's metric (pair, layer, pos or head), `clean`, `corrupted` (pair), `token_id`."""
        return self._dataset

    @property
    def units(self) -> list[str]:
        """What was patched: some of resid_pre, attn_out, mlp_out, head_out."""
        return list(self._dataset.attrs["units"])

    @property
    def direction(self) -> str:
        """`denoising` (clean into corrupted) or `noising`."""
        return self._dataset.attrs["direction"]

    @cached_property
    def pairs(self) -> pd.DataFrame:
        """`pairs.parquet`: one row a pair, with its length, metrics, answer and token labels."""
        return self.read_table(PAIRS_FILE)

    @property
    def lengths(self) -> list[int]:
        """The prompt lengths that occur, in tokens."""
        return sorted(int(n) for n in self.pairs["n_pos"].unique())

    def labels(self, n_pos: int | None = None) -> list[str]:
        """Return the text of each token of the first clean prompt (of this length)."""
        return list(self._of_length(n_pos)["labels"].iloc[0])

    def effects(self, unit: str, n_pos: int | None = None) -> xr.DataArray:
        """Return the metric of each patched run (pair, layer, pos or head), of all pairs or those of one length.

        Raises ConfigError if the unit was not patched, or no pair has this length.
        """
        if unit not in self.units:
            near = near_names(unit, self.units)
            raise ConfigError(f"{self.id} has no unit {unit!r}.{near} It has {', '.join(self.units)}.")
        values = self._dataset[unit]
        if n_pos is None:
            return values
        values = values.sel(pair=self._of_length(n_pos)["pair"].to_numpy())
        return values if unit == _BY_HEAD else values.isel(pos=slice(n_pos))

    def recovered(self, unit: str, n_pos: int | None = None) -> xr.DataArray:
        """Return the fraction of the metric that a patch restores (layer, pos or head), of means over pairs.

        Denoising: (patched - corrupted) / (clean - corrupted); noising: (patched - clean) / (corrupted - clean).
        Each cell's means run over the pairs that have it. `n_pos` chooses the pairs of one length.
        """
        values = self.effects(unit, n_pos)
        measured = values.notnull()
        clean, corrupted = (self._dataset[name].where(measured).mean("pair") for name in ("clean", "corrupted"))
        fraction = effect_fraction(values.mean("pair"), clean, corrupted, self.direction)  # pyright: ignore[reportArgumentType]
        return fraction.rename(f"{unit}_recovered")

    def to_pandas(self, unit: str) -> pd.DataFrame:
        """Return one row a measured cell: pair, layer, pos or head, and the metric's value."""
        frame = self.effects(unit).to_dataframe(name="value").reset_index()
        return frame.loc[frame["value"].notna()].reset_index(drop=True)

    def _of_length(self, n_pos: int | None) -> pd.DataFrame:
        if n_pos is None:
            return self.pairs
        chosen = self.pairs.loc[self.pairs["n_pos"] == n_pos]
        if chosen.empty:
            lengths = ", ".join(map(str, self.lengths))
            raise ConfigError(f"{self.id} has no pair of {n_pos} tokens; it has lengths {lengths}.")
        return chosen


def effects_dataset(
    values: Mapping[Unit, np.ndarray],
    clean: np.ndarray,
    corrupted: np.ndarray,
    tokens: dict[str, np.ndarray],
    pairs: np.ndarray,
    attributes: Mapping[str, str],
) -> xr.Dataset:
    """Put a sweep's arrays together: `values` by unit (pair, layer, column), metrics (pair), `tokens` (pair, pos)."""
    third = {unit: "head" if unit == _BY_HEAD else "pos" for unit in values}
    variables: dict[str, tuple[tuple[str, ...], np.ndarray]] = {
        unit: (("pair", "layer", third[unit]), array) for unit, array in values.items()
    }
    variables |= {"clean": (("pair",), clean), "corrupted": (("pair",), corrupted)}
    variables |= {name: (("pair", "pos"), array) for name, array in tokens.items()}
    dataset = xr.Dataset(variables, attrs={**attributes, "units": list(values)})
    counted = [name for name in ("layer", "pos", "head") if name in dataset.sizes]
    indices = {name: np.arange(dataset.sizes[name], dtype=np.int32) for name in counted}
    return dataset.assign_coords({"pair": pairs, **indices})
