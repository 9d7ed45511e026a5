"""The artifact of the stage `patch`: what each single patch does to the metric, pair by pair.

On disk `effects.zarr` and `pairs.parquet` (data/README.md, "patch"). Cells that were not measured are NaN,
never zero: positions beyond a pair's length, units that the model does not have are absent.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from mi_pipe.core.artifact import Artifact
from mi_pipe.core.errors import ConfigError, near_names
from mi_pipe.patching.metrics import Direction, effect_fraction
from mi_pipe.patching.places import NO_PLACE, place_positions
from mi_pipe.patching.statistics import (
    Resampling,
    bootstrap_weights,
    percentile_interval,
    sign_flip_p,
    weighted_means,
)
from mi_pipe.patching.units import BY_POS, UNITS, Unit, axes_of
from mi_pipe.prompts.prompt_set import PLACE_PREFIX

EFFECTS_FOLDER = "effects.zarr"
PAIRS_FILE = "pairs.parquet"


class PatchEffects(Artifact):
    """Activation patching of one task."""

    @cached_property
    def _dataset(self) -> xr.Dataset:
        return xr.open_zarr(self.zarr_group(EFFECTS_FOLDER), consolidated=False, chunks=None)

    def to_xarray(self) -> xr.Dataset:
        """Return everything: a unit's metric (pair, layer, its axes), `clean`, `corrupted` (pair), `token_id`."""
        return self._dataset

    @property
    def units(self) -> list[str]:
        """What was patched, such as resid_pre, attn_out, mlp_out, head_out."""
        return list(self._dataset.attrs["units"])

    @property
    def direction(self) -> Direction:
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
        """Return the metric of each patched run (pair, layer, the unit's axes), of all pairs or those of one length.

        Raises ConfigError if the unit was not patched, or no pair has this length.
        """
        if unit not in self.units:
            near = near_names(unit, self.units)
            raise ConfigError(f"{self.id} has no unit {unit!r}.{near} It has {', '.join(self.units)}.")
        values = self._dataset[array_of(unit)]
        if n_pos is None:
            return values
        values = values.sel(pair=self._of_length(n_pos)["pair"].to_numpy())
        return values.isel(pos=slice(n_pos)) if "pos" in values.dims else values

    def recovered(self, unit: str, n_pos: int | None = None) -> xr.DataArray:
        """Return the fraction of the metric that a patch restores (layer, the unit's axes), of means over pairs.

        Denoising: (patched - corrupted) / (clean - corrupted); noising: (patched - clean) / (corrupted - clean).
        Each cell's means run over the pairs that have it; NaN where clean and corrupted have one mean. `n_pos` chooses
        the pairs of one length.
        """
        values = self.effects(unit, n_pos)
        measured = values.notnull()
        clean, corrupted = (self._dataset[name].where(measured).mean("pair") for name in ("clean", "corrupted"))
        fraction = effect_fraction(values.mean("pair"), clean, corrupted, self.direction)
        return fraction.rename(f"{unit}_recovered")

    def statistics(self, unit: str, n_pos: int | None = None, how: Resampling | None = None) -> xr.Dataset:
        """Return of each cell `mean`, `low`, `high`, `p` of its change, and `recovered` with its interval.

        The change is the patched metric less the base run's, one value a pair; `low` to `high` is the percentile
        bootstrap interval of its mean, `p` the sign-flip p-value (of this cell alone: many cells are looked at).
        `recovered` is the fraction of means (see `recovered`), with the interval from the same draws of pairs.
        """
        how = how or Resampling()
        values = self.effects(unit, n_pos)
        patched, dims = values.to_numpy().astype(np.float64), values.dims[1:]
        clean, corrupted = (self._metric_at(values, name) for name in ("clean", "corrupted"))
        changes = patched - (corrupted if self.direction == "denoising" else clean)
        weights = bootstrap_weights(len(patched), how)
        interval = percentile_interval(weighted_means(weights, changes), how.level)
        drawn = [weighted_means(weights, runs) for runs in (patched, clean, corrupted)]
        fractions = percentile_interval(effect_fraction(drawn[0], drawn[1], drawn[2], self.direction), how.level)
        columns = {
            "mean": weighted_means(np.ones((1, len(changes))), changes)[0],
            **dict(zip(("low", "high"), interval, strict=True)),
            "p": sign_flip_p(changes, how),
            "recovered": self.recovered(unit, n_pos).to_numpy(),
            **dict(zip(("recovered_low", "recovered_high"), fractions, strict=True)),
        }
        coordinates = {name: values.coords[name] for name in values.coords if "pair" not in values.coords[name].dims}
        return xr.Dataset({name: (dims, array) for name, array in columns.items()}, coordinates)

    def at_places(self, unit: str, names: Sequence[str]) -> xr.DataArray:
        """Return a unit's metric by position class (pair, layer, …, place), NaN where a pair has no such place.

        Names are those of the task (IOI: io, s1, s2, end), also with a distance, such as s1+1. Raises ConfigError for
        other names, and for units without positions.
        """
        values = self.effects(unit)
        if "pos" not in values.dims:
            single = f"; patch {unit}{BY_POS} for single ones" if f"{unit}{BY_POS}" in UNITS else ""
            raise ConfigError(f"{unit} was patched at all positions at once{single}.")
        places = {
            column.removeprefix(PLACE_PREFIX): self.pairs[column].fillna(NO_PLACE).to_numpy(np.int64)
            for column in self.pairs
            if column.startswith(PLACE_PREFIX)
        }
        n_pos = self.pairs["n_pos"].to_numpy(np.int64)
        found = []
        for name in names:
            positions = xr.DataArray(place_positions(places, n_pos, name), dims="pair", coords={"pair": values["pair"]})
            there = values.isel(pos=positions.clip(min=0)).drop_vars("pos")
            found.append(there.where(positions != NO_PLACE))
        return xr.concat(found, pd.Index(names, name="place")).transpose(*values.dims[:-1], "place")

    def _metric_at(self, values: xr.DataArray, run: str) -> np.ndarray:
        """Return a run's metric in the shape of `values`, NaN where those are."""
        metric = self._dataset[run].sel(pair=values["pair"])
        return metric.broadcast_like(values).where(values.notnull()).transpose(*values.dims).to_numpy().astype(float)

    def to_pandas(self, unit: str) -> pd.DataFrame:
        """Return one row a measured cell: pair, layer, the unit's axes, and the metric's value."""
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


def array_of(unit: str) -> str:
    """Return the name of a unit's array: xarray takes one named like an axis of its own for a coordinate."""
    return "neurons" if unit == "neuron" else unit


def effects_dataset(
    values: Mapping[Unit, np.ndarray],
    clean: np.ndarray,
    corrupted: np.ndarray,
    tokens: dict[str, np.ndarray],
    pairs: np.ndarray,
    attributes: Mapping[str, Any],
    coordinates: Mapping[str, tuple[tuple[str, ...], np.ndarray]],
) -> xr.Dataset:
    """Put a sweep's arrays together: `values` by unit (pair, layer, *axes), metrics (pair), `tokens` (pair, pos).

    Embeddings lie before all layers: theirs are (pair, pos). `coordinates`, by name and with dimensions, are texts of
    tokens, and which neurons and features of each layer were patched.
    """
    variables: dict[str, tuple[tuple[str, ...], np.ndarray]] = {
        array_of(unit): (("pair", *axes_of(unit)), array[:, 0])
        if unit == "embed"
        else (("pair", "layer", *axes_of(unit)), array)
        for unit, array in values.items()
    }
    variables |= {"clean": (("pair",), clean), "corrupted": (("pair",), corrupted)}
    variables |= {name: (("pair", "pos"), array) for name, array in tokens.items()}
    dataset = xr.Dataset(variables, attrs={**attributes, "units": list(values)})
    counted = [name for name in ("layer", "pos", "head", "kv_head") if name in dataset.sizes]
    indices = {name: np.arange(dataset.sizes[name], dtype=np.int32) for name in counted}
    return dataset.assign_coords({**coordinates, "pair": pairs, **indices})
