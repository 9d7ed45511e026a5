"""The read side of `harvest`: stored activations as arrays, rows and frames.

Rows are kept tokens in prompt order. Everything is read on demand; `read_rows` and `take` go straight to the shard
files and compare checksums on first touch.
"""

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int

from mi_pipe.activations import frames
from mi_pipe.activations.group import GROUP_NAME
from mi_pipe.activations.raw_array import RawArray
from mi_pipe.activations.row_table import MASSIVE_PREFIX, TOKENS_FILE
from mi_pipe.activations.statistics import HookStatistics
from mi_pipe.activations.storage_dtype import StoreDType, decode
from mi_pipe.core.artifact import Artifact
from mi_pipe.core.errors import ConfigError, HookPointError, near_names

if TYPE_CHECKING:
    import dask.array as da
    import xarray as xr
    import zarr

PROMPTS_FILE = "prompts.parquet"
STATISTICS_FILE = "statistics.safetensors"
PRECISION_FILE = "precision.json"
_SPLIT_STREAM = 0x5B117


class ActivationStore(Artifact):
    """Activations at some hook points for every kept token of a prompt set."""

    @property
    def group_path(self) -> Path:
        """The Zarr group, for any program that reads Zarr v3."""
        return self.path / GROUP_NAME

    @cached_property
    def group(self) -> "zarr.Group":
        """The Zarr group as zarr-python opens it."""
        import zarr

        return zarr.open_group(self.group_path, mode="r")

    @cached_property
    def _attributes(self) -> dict[str, Any]:
        return dict(self.group.attrs)

    @property
    def hooks(self) -> list[str]:
        """The hook points, in the order they were asked for."""
        return list(self._attributes["hooks"])

    @property
    def n_rows(self) -> int:
        """Number of rows (kept tokens)."""
        return int(self._attributes["n_tokens"])

    @property
    def n_prompts(self) -> int:
        """Number of prompts."""
        return int(self._attributes["n_prompts"])

    @property
    def shard_rows(self) -> int:
        """Rows of a shard."""
        return int(self._attributes["shard_rows"])

    @property
    def dtype(self) -> StoreDType:
        """The dtype on disk."""
        return self._attributes["store_dtype"]

    def width(self, hook: str) -> int:
        """Return the number of values a row."""
        return self.array(hook).layout.width

    def chunk_rows(self, hook: str) -> int:
        """Return the rows of a chunk."""
        return self.array(hook).layout.chunk_rows

    def array(self, hook: str) -> RawArray:
        """Return the direct reader of one hook point; raises HookPointError with near names."""
        if hook not in self._arrays:
            if hook not in self.hooks:
                raise HookPointError(
                    f"{self.id} holds no {hook!r}.{near_names(hook, self.hooks)} It holds {', '.join(self.hooks)}."
                )
            self._arrays[hook] = RawArray(self.group_path, hook)
        return self._arrays[hook]

    @cached_property
    def _arrays(self) -> dict[str, RawArray]:
        return {}

    def read_rows(self, hook: str, start: int, stop: int) -> Float[np.ndarray, "row width"]:
        """Return rows `start` to `stop` (exclusive) in float32; raises IndexError outside the store."""
        return decode(self.array(hook).read(start, stop), self.dtype)

    def take(self, hook: str, rows: Int[np.ndarray, " row"]) -> Float[np.ndarray, "row width"]:
        """Return the given rows, in their order, in float32."""
        return decode(self.array(hook).take(rows), self.dtype)

    @cached_property
    def prompt_offset(self) -> Int[np.ndarray, " prompt_edge"]:
        """Where each prompt's rows begin, and where the last prompt's end; int64."""
        return np.asarray(self.group["prompt_offset"][:])  # pyright: ignore[reportIndexIssue, reportArgumentType]

    @cached_property
    def prompt_idx(self) -> Int[np.ndarray, " row"]:
        """Prompt of each row, int32."""
        return self._row_array("prompt_idx")

    @cached_property
    def pos(self) -> Int[np.ndarray, " row"]:
        """Position of each row's token in its prompt, int32; 0 is BOS where the model has one."""
        return self._row_array("pos")

    @cached_property
    def token_id(self) -> Int[np.ndarray, " row"]:
        """Token of each row, int32."""
        return self._row_array("token_id")

    def _row_array(self, name: str) -> Int[np.ndarray, " row"]:
        return np.asarray(self.group[name][:])  # pyright: ignore[reportIndexIssue, reportArgumentType]

    def table(self, columns: list[str] | None = None) -> pd.DataFrame:
        """Return `tokens.parquet` or some of its columns: row, prompt_idx, pos, token_id, text, massive:<hook>."""
        return self.read_table(TOKENS_FILE, columns)

    @cached_property
    def prompts(self) -> pd.DataFrame:
        """`prompts.parquet` of the prompt set."""
        return self.read_table(PROMPTS_FILE)

    def massive(self, hook: str) -> Bool[np.ndarray, " row"]:
        """Say for each row whether its norm at a hook point is massive."""
        column = MASSIVE_PREFIX + self.array(hook).layout.name
        return self.table([column])[column].to_numpy(bool)

    def statistics(self, hook: str) -> HookStatistics:
        """Return mean, variance and norms of a hook point's rows, massive ones left out."""
        return HookStatistics.from_tensors(self._statistics, self.array(hook).layout.name)

    @cached_property
    def _statistics(self) -> dict[str, Any]:
        return self.read_tensors(STATISTICS_FILE)

    @cached_property
    def precision(self) -> dict[str, Any]:
        """The measured error of the stored values against float32, as `precision.json` has it."""
        return self.read_json(PRECISION_FILE)

    def prompt_split(
        self, held_out_fraction: float, seed: int
    ) -> tuple[Bool[np.ndarray, " row"], Bool[np.ndarray, " row"]]:
        """Return which rows are for training and which are held out: whole prompts, at least one of each.

        The same fraction and seed give the same split for everyone who asks. Raises ConfigError if the
        fraction is not within 0 to 1, or leaves no prompt on one side.
        """
        held_out = self.held_out_prompts(held_out_fraction, seed)[self.prompt_idx]
        return ~held_out, held_out

    def held_out_prompts(self, held_out_fraction: float, seed: int) -> Bool[np.ndarray, " prompt"]:
        """Say for each prompt whether it is held out."""
        if not 0 <= held_out_fraction < 1:
            raise ConfigError(f"held_out_fraction is {held_out_fraction}; it has to be at least 0 and less than 1.")
        n_held_out = round(held_out_fraction * self.n_prompts)
        if held_out_fraction > 0:
            n_held_out = max(1, n_held_out)
        if n_held_out >= self.n_prompts:
            raise ConfigError(
                f"{self.id} has {self.n_prompts} prompts; holding out {n_held_out} leaves none to train on."
            )
        generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, _SPLIT_STREAM])))
        mask = np.zeros(self.n_prompts, bool)
        mask[generator.permutation(self.n_prompts)[:n_held_out]] = True
        return mask

    def tokens(self, text: str) -> pd.DataFrame:
        """Return the table's lines whose token is just `text`, such as " Mary"; empty if there is none."""
        table = self.table()
        return table[table["text"] == text].set_index("row")

    def prompt(self, i: int) -> "xr.Dataset":
        """Return all activations of one prompt, in memory; raises IndexError beyond the last."""
        if not 0 <= i < self.n_prompts:
            raise IndexError(f"prompt {i} of {self.id}, which has prompts 0 to {self.n_prompts - 1}")
        start, stop = (int(row) for row in self.prompt_offset[i : i + 2])
        return frames.prompt_dataset(self, start, stop)

    def to_xarray(self) -> "xr.Dataset":
        """Return all hook points as one lazy data set (dimension token, coordinates token_id, prompt_idx, pos)."""
        return frames.to_xarray(self)

    def to_dask(self, hook: str) -> "da.Array":
        """Return one hook point as a lazy dask array (token, width), one task a shard."""
        return frames.to_dask(self, hook)

    def to_pandas(self, hook: str, where: str | None = None, columns: list[int] | None = None) -> pd.DataFrame:
        """Return rows of a hook point as a frame: the token table's columns, then one column a value.

        `where` is a pandas query on the table, in which `token` stands for `text`:
        `"token == ' Paris' and pos > 3"`. Only the rows asked for are read. `columns` picks values.
        """
        return frames.to_pandas(self, hook, where, columns)
