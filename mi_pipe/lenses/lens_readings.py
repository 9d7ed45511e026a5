"""The artifact of the stage `lenses`: readings of task prompts, and the tuned lens with its training and evaluation."""

from functools import cached_property

import numpy as np
import pandas as pd
import xarray as xr

from mi_pipe.core.artifact import Artifact
from mi_pipe.core.errors import ConfigError, near_names
from mi_pipe.lenses.depths import depth_of, hook_at
from mi_pipe.lenses.evaluation import LOGIT
from mi_pipe.lenses.translators import Translator

TASKS_FOLDER = "tasks"
TOKENS_FILE = "vocabulary.parquet"
TRANSLATORS_FILE = "translators.safetensors"
TRAINING_FILE = "training.parquet"
EVALUATION_FILE = "evaluation.parquet"


class LensReadings(Artifact):
    """What the residual stream says of the next token, by depth and position."""

    @property
    def tasks(self) -> list[str]:
        """Tasks whose prompts were read."""
        folder = self.path / TASKS_FOLDER
        return sorted(path.stem for path in folder.glob("*.zarr")) if folder.is_dir() else []

    def to_xarray(self, task: str) -> xr.Dataset:
        """Return a task's readings, read when used: figures (lens, prompt, depth, pos, and choice or top).

        Raises ConfigError for a task that was not read.
        """
        if task not in self.tasks:
            near = near_names(task, self.tasks)
            raise ConfigError(f"{self.id} has no task {task!r}.{near} It has {', '.join(self.tasks) or 'none'}.")
        return xr.open_zarr(self.zarr_group(f"{TASKS_FOLDER}/{task}.zarr"), consolidated=False, chunks=None)

    def to_pandas(self, task: str, lens: str = LOGIT) -> pd.DataFrame:
        """Return one row a prompt, depth and position: entropy, kl, and log_prob and rank of each choice."""
        data = self._of_lens(task, lens)
        wide = data[["entropy", "kl"]].to_dataframe().reset_index()
        for choice in data["choice"].values:
            one = data[["log_prob", "rank"]].sel(choice=choice).to_dataframe().reset_index()
            wide[[f"{choice}_log_prob", f"{choice}_rank"]] = one[["log_prob", "rank"]]
        return wide.dropna(subset=["kl"]).drop(columns=["lens"]).reset_index(drop=True)

    def labels(self, task: str, prompt: int) -> list[str]:
        """Return the text of each token of a prompt (its `prompt_idx` in the task)."""
        ids = self._prompt(self.to_xarray(task), prompt)["token_id"].to_numpy()
        return self.texts(ids[ids >= 0])

    def top(self, task: str, prompt: int, lens: str = LOGIT, rank: int = 0) -> pd.DataFrame:
        """Return the text of the likeliest token (or the one of that rank): one row a depth, one column a position.

        Raises ConfigError for a task, prompt, lens or rank that was not read.
        """
        data = self._prompt(self._of_lens(task, lens), prompt)
        if not 0 <= rank < data.sizes["top"]:
            raise ConfigError(f"{self.id} has the {data.sizes['top']} likeliest tokens, ranks from 0, not rank {rank}.")
        ids = data["top_id"].isel(top=rank).to_numpy()[:, data["token_id"].to_numpy() >= 0]
        shown = [self.texts(row) for row in ids]
        return pd.DataFrame(shown, index=pd.Index(range(len(ids)), name="depth"))

    def texts(self, token_ids: np.ndarray) -> list[str]:
        """Return the text of tokens that occur in the readings, "" for -1."""
        return [self._texts.get(int(token), "") for token in token_ids]

    @property
    def is_tuned(self) -> bool:
        """Say whether a tuned lens was trained."""
        return TRANSLATORS_FILE in self.manifest.files

    @property
    def hooks(self) -> list[str]:
        """Hook points for which there is a translator, by depth."""
        names = {name.rpartition(".")[0] for name in self._tensors} if self.is_tuned else set()
        return sorted(names, key=lambda name: depth_of(name) or 0)

    def translator(self, hook: str) -> Translator:
        """Return the tuned lens's map at a hook point (resid_pre and resid_post both count); raises ConfigError."""
        depth = depth_of(hook)
        name = hook if hook in self.hooks or depth is None else hook_at(depth)
        if name not in self.hooks:
            known = ", ".join(self.hooks) or "none"
            raise ConfigError(f"{self.id} has no translator of {hook!r}.{near_names(hook, self.hooks)} It has {known}.")
        return Translator(self._tensors[f"{name}.weight"], self._tensors[f"{name}.bias"])

    @cached_property
    def training(self) -> pd.DataFrame:
        """`training.parquet`: KL on training and validation rows by depth as the training went on."""
        return self.read_table(TRAINING_FILE)

    @cached_property
    def evaluation(self) -> pd.DataFrame:
        """`evaluation.parquet`: each lens on held-out rows, by depth."""
        return self.read_table(EVALUATION_FILE)

    def _of_lens(self, task: str, lens: str) -> xr.Dataset:
        data = self.to_xarray(task)
        known = [str(name) for name in data["lens"].values]
        if lens not in known:
            raise ConfigError(f"{self.id} has no lens {lens!r} of {task}; it has {', '.join(known)}.")
        return data.sel(lens=lens)

    def _prompt(self, data: xr.Dataset, prompt: int) -> xr.Dataset:
        known = data["prompt"].to_numpy()
        if prompt not in known:
            shown = ", ".join(map(str, known))
            raise ConfigError(f"{self.id} has no prompt {prompt}; it has {shown}.")
        return data.sel(prompt=prompt)

    @cached_property
    def _tensors(self):
        return self.read_tensors(TRANSLATORS_FILE)

    @cached_property
    def _texts(self) -> dict[int, str]:
        table = self.read_table(TOKENS_FILE)
        return dict(zip(table["token_id"].astype(int), table["text"].astype(str), strict=True))
