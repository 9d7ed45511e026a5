"""The artifact of the stage `heads`: a score table, the loss on repeated tokens, attention patterns of tasks."""

from functools import cached_property

import numpy as np
import pandas as pd
import xarray as xr

from mi_pipe.core.artifact import Artifact
from mi_pipe.core.errors import ConfigError, near_names

SCORES_FILE = "scores.parquet"
LOSS_FILE = "loss.json"
PATTERNS_FOLDER = "patterns"
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

    @property
    def tasks(self) -> list[str]:
        """Tasks whose patterns are stored."""
        folder = self.path / PATTERNS_FOLDER
        return sorted(path.stem for path in folder.glob("*.zarr")) if folder.is_dir() else []

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
