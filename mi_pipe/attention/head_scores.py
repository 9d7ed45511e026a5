"""The artifact of the stage `heads`: scores, classes with their evidence, composition, attribution, attention."""

from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from mi_pipe.core.artifact import Artifact
from mi_pipe.core.errors import ConfigError, near_names

SCORES_FILE = "scores.parquet"
LOSS_FILE = "loss.json"
PATTERNS_FOLDER = "patterns"
ATTENTION_FOLDER = "attention"
ATTRIBUTION_FOLDER = "attribution"
COMPOSITION_FOLDER = "composition.zarr"
CLASSES_FILE = "classes.parquet"
CRITERIA_FILE = "classes.json"
_KEYS = ("layer", "head")


class HeadScores(Artifact):
    """What every attention head of a model does."""

    @cached_property
    def _scores(self) -> pd.DataFrame:
        return self.read_table(SCORES_FILE)

    def scores(self) -> pd.DataFrame:
        """Return one row a head: layer, head, and its scores."""
        return self._scores.copy()

    @property
    def score_names(self) -> list[str]:
        """The names of the scores."""
        return [str(name) for name in self._scores.columns if name not in _KEYS]

    def top(self, score: str, n: int = 10) -> pd.DataFrame:
        """Return the `n` heads with the highest score: layer, head, name ("18.6") and the score, best first."""
        if score not in self.score_names:
            near = near_names(score, self.score_names)
            raise ConfigError(f"{self.id} has no score {score!r}.{near} It has {', '.join(self.score_names)}.")
        best = self._scores.nlargest(n, score).loc[:, [*_KEYS, score]].reset_index(drop=True)
        best.insert(2, "name", [f"{layer}.{head}" for layer, head in zip(best["layer"], best["head"], strict=True)])
        return best

    def grid(self, score: str) -> xr.DataArray:
        """Return one score as (layer, head)."""
        self.top(score, 1)
        table = self._scores.set_index(list(_KEYS))[score]
        return table.to_xarray()

    @property
    def loss(self) -> dict[str, float]:
        """Loss, in nats, on the first and the second copy of repeated random tokens, and how it was measured."""
        return self.read_json(LOSS_FILE)

    def classes(self, name: str | None = None) -> pd.DataFrame:
        """Return one row a head: `classes`, `candidate_for` and the evidence; or the members of one class alone."""
        if CLASSES_FILE not in self.manifest.files:
            raise ConfigError(f"{self.id} has no classes of heads; an earlier version of the stage made it.")
        table = self.read_table(CLASSES_FILE)
        if name is None:
            return table
        if name not in self.criteria:
            near = near_names(name, self.criteria)
            raise ConfigError(f"There is no class of heads {name!r}.{near} Classes are {', '.join(self.criteria)}.")
        is_member = [name in found for found in table["classes"].str.split(", ")]
        return table.loc[is_member].reset_index(drop=True)

    @property
    def criteria(self) -> dict[str, list[dict[str, Any]]]:
        """What each class asks of a head: columns of evidence, and from which value on they count."""
        return self.read_json(CRITERIA_FILE)["criteria"]

    @property
    def refused(self) -> dict[str, str]:
        """What could not be measured of this model, and why."""
        return self.read_json(CRITERIA_FILE)["refused"] if CRITERIA_FILE in self.manifest.files else {}

    def composition(self, above_random: bool = False) -> xr.DataArray:
        """Return composition of all pairs of heads (kind, layer, head, later_layer, later_head), NaN where not later.

        `kind` is q, k or v; `above_random` takes away the mean score of heads with random weights.
        """
        dataset = self._zarr(COMPOSITION_FOLDER, "composition")
        if above_random and "random_mean" not in dataset.attrs:
            raise ConfigError(f"{self.id} has no random baseline; make it with baseline_draws above 0.")
        scores = dataset.to_dataarray("kind").assign_attrs(dataset.attrs)
        return scores - dataset.attrs["random_mean"] if above_random else scores

    def attribution(self, task: str) -> xr.Dataset:
        """Return what each component writes to the logit difference of a task's clean prompts, by pair.

        Variables: `heads` (pair, layer, head), `attn_bias`, `mlps` (pair, layer), `embed`, `pos_embed`, `bias`, which
        sum to `logit_diff` (pair).
        """
        return self._of_task(ATTRIBUTION_FOLDER, task)

    def attention(self, task: str) -> xr.Dataset:
        """Return `habits` (pair, layer, head, habit) on a task's clean prompts, and `places` (…, from, to).

        `places` is the attention between the positions that the task names, such as from "end" to "io".
        """
        found = self._of_task(ATTENTION_FOLDER, task)
        places = {axis: found.attrs["place"] for axis in ("from", "to") if "places" in found}
        return found.assign_coords(habit=found.attrs["habit"], **places)

    @property
    def attributed_tasks(self) -> list[str]:
        """Tasks that have direct logit attribution."""
        return self._tasks_in(ATTRIBUTION_FOLDER)

    @property
    def attended_tasks(self) -> list[str]:
        """Tasks on whose prompts attention was measured."""
        return self._tasks_in(ATTENTION_FOLDER)

    @property
    def tasks(self) -> list[str]:
        """Tasks whose patterns are stored."""
        return self._tasks_in(PATTERNS_FOLDER)

    def pattern(self, task: str) -> xr.DataArray:
        """Return attention patterns of a task's clean prompts (prompt, layer, head, query, key), read when used.

        Attributes: `labels`, the token texts of each prompt; NaN beyond a prompt's length.
        """
        if task not in self.tasks:
            near = near_names(task, self.tasks)
            raise ConfigError(f"{self.id} has no patterns of task {task!r}.{near} It has {', '.join(self.tasks)}.")
        stored = self.zarr_group(f"{PATTERNS_FOLDER}/{task}.zarr")
        dataset = xr.open_zarr(stored, consolidated=False, chunks=None)
        pattern = dataset["pattern"].assign_attrs(dataset.attrs)
        positions = np.arange(pattern.sizes["query"], dtype=np.int32)
        return pattern.assign_coords(prompt=dataset["prompt"], query=positions, key=positions)

    def _of_task(self, folder: str, task: str) -> xr.Dataset:
        names = self._tasks_in(folder)
        if task not in names:
            reason = next(iter(self.refused.values()), "")
            has = f"It has {', '.join(names)}." if names else reason
            raise ConfigError(f"{self.id} has no {folder} of task {task!r}.{near_names(task, names)} {has}".strip())
        return self._zarr(f"{folder}/{task}.zarr", folder)

    def _tasks_in(self, folder: str) -> list[str]:
        path = self.path / folder
        return sorted(found.stem for found in path.glob("*.zarr")) if path.is_dir() else []

    def _zarr(self, name: str, what: str) -> xr.Dataset:
        if not (self.path / name).is_dir():
            raise ConfigError(f"{self.id} has no {what}. {self.refused.get('weights', 'It was not asked for.')}")
        return xr.open_zarr(self.zarr_group(name), consolidated=False, chunks=None)
