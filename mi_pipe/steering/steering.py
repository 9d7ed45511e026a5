"""The artifact of the stage `steer`: directions, their effects by coefficient, and texts written under them.

On disk data/README.md, "steer". Values are kept prompt by prompt; means and intervals are computed here.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from mi_pipe.core.artifact import Artifact
from mi_pipe.core.errors import ConfigError, near_names
from mi_pipe.steering.direction import Direction
from mi_pipe.steering.summary import effect_table
from mi_pipe.steering.texts import GREEDY

DIRECTIONS_FILE = "directions.parquet"
UNITS_FILE = "directions.safetensors"
GENERATIONS_FILE = "generations.parquet"
TASKS_FOLDER = "metric"
LOSS_FOLDER = "loss.zarr"
LOSS = "loss"
"""The measure that is no task: cross-entropy on text, in nats a token."""


class Steering(Artifact):
    """What some directions do when they are added to a model's activations."""

    def directions(self) -> pd.DataFrame:
        """Return one row a direction: `direction` (its name), `kind`, `hook`, `layer`, `scale`, `source`, `control_of`.

        Random directions name the one whose steps they have in `control_of`; it is "" for the others.
        """
        return self._directions.copy()

    def direction(self, name: str) -> Direction:
        """Return one direction, ready to be used with the model; raises ConfigError naming those there are."""
        row = self._directions.set_index("direction").loc[self._known(name)]
        return Direction(row["hook"], self._units[name], float(row["scale"]), row["kind"], row["source"])

    @property
    def coefficients(self) -> list[float]:
        """The coefficients, ascending; 0 is the model as it is."""
        return [float(coefficient) for coefficient in self.config["coefficients"]]

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks whose metric was read."""
        prefix = f"{TASKS_FOLDER}/"
        found = (name.removeprefix(prefix) for name in self.manifest.files if name.startswith(prefix))
        return list(dict.fromkeys(name.partition(".zarr/")[0] for name in found))

    @property
    def measures(self) -> list[str]:
        """What was measured: tasks, and `loss` on text."""
        has_loss = any(name.startswith(f"{LOSS_FOLDER}/") for name in self.manifest.files)
        return [*self.tasks, *([LOSS] if has_loss else [])]

    def to_xarray(self, measure: str) -> xr.Dataset:
        """Return `metric` (direction, coefficient, pair) of a task, or `loss` (…, prompt) with `n_tokens` (prompt).

        Raises ConfigError if it was not measured.
        """
        if measure not in self.measures:
            near = near_names(measure, self.measures) or f" It has {', '.join(self.measures) or 'no measures'}."
            raise ConfigError(f"{self.id} has not measured {measure!r}.{near}")
        folder = LOSS_FOLDER if measure == LOSS else f"{TASKS_FOLDER}/{measure}.zarr"
        found = xr.open_zarr(self.zarr_group(folder), consolidated=False, chunks=None)
        return found.assign_coords(direction=list(found.attrs["directions"]))

    def effects(self, measure: str | None = None) -> pd.DataFrame:
        """Return one row a measure (all, or the one named), direction and coefficient.

        `mean` over prompts with a 95% bootstrap interval (`low`, `high`), and `change` from coefficient 0 on the same
        prompts with its own (`change_low`, `change_high`). The mean of `loss` is over tokens; exp of it is perplexity.
        """
        wanted = self.measures if measure is None else [measure]
        tables = [effect_table(self.to_xarray(name), name) for name in wanted]
        return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()

    def generations(self, direction: str | None = None) -> pd.DataFrame:
        """Return one row a text that was written; none if none was asked for.

        Columns: `direction`, `coefficient`, `prompt`, `sample` (-1: greedy), `prompt_text`, `token_ids`, `text`. With a
        direction its texts and those of the model as it is, whose `direction` is "".
        """
        if GENERATIONS_FILE not in self.manifest.files:
            return pd.DataFrame()
        frame = self.read_table(GENERATIONS_FILE)
        return frame if direction is None else frame.loc[frame["direction"].isin(["", self._known(direction)])]

    def greedy(self) -> pd.DataFrame:
        """Return the greedy texts alone."""
        frame = self.generations()
        return frame.loc[frame["sample"] == GREEDY].reset_index(drop=True) if len(frame) else frame

    def _known(self, name: str) -> str:
        known = list(self._directions["direction"])
        if name not in known:
            raise ConfigError(
                f"{self.id} has no direction {name!r}.{near_names(name, known)} It has {', '.join(known)}."
            )
        return name

    @cached_property
    def _directions(self) -> pd.DataFrame:
        return self.read_table(DIRECTIONS_FILE)

    @cached_property
    def _units(self) -> dict[str, Any]:
        return self.read_tensors(UNITS_FILE)


def effects_dataset(
    variables: Mapping[str, tuple[tuple[str, ...], np.ndarray]],
    directions: Sequence[str],
    coefficients: Sequence[float],
    attributes: Mapping[str, str],
    **coordinates: np.ndarray,
) -> xr.Dataset:
    """Put the arrays of one measure together; names of directions are the attribute `directions`."""
    dataset = xr.Dataset(variables, attrs={**attributes, "directions": list(directions)})
    return dataset.assign_coords({"coefficient": np.array(coefficients, np.float64), **coordinates})
