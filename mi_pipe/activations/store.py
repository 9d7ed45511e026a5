"""The read side of `harvest`: stored activations as arrays, rows and frames.

Rows are kept tokens in prompt order. Everything is read on demand; `read_rows`, `take` and `blocks` go straight to the
shard files and compare checksums on first touch, or through zarr-python where others wrote the arrays.
"""

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int

from mi_pipe.activations import agreement, describe, frames, summaries
from mi_pipe.activations.blocks import Block, read_blocks
from mi_pipe.activations.group import GROUP_NAME
from mi_pipe.activations.row_array import RowArray
from mi_pipe.activations.row_table import MASSIVE_PREFIX, TOKENS_FILE
from mi_pipe.activations.statistics import HookStatistics
from mi_pipe.activations.storage_dtype import StoreDType, decode
from mi_pipe.activations.stored_chunks import StoredChunks
from mi_pipe.activations.token_table import TokenTable
from mi_pipe.activations.where import Condition
from mi_pipe.activations.zarr_array import METADATA_FILES, open_row_array
from mi_pipe.core.artifact import Artifact
from mi_pipe.core.damage import Damage
from mi_pipe.core.errors import ConfigError, HookPointError, near_names
from mi_pipe.core.place import Place

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

    is_partial = False
    """True of an unfinished harvest (`mi_pipe.open(..., partial=True)`); then some rows are missing."""

    @property
    def group_path(self) -> Path:
        """The Zarr group on this machine, for any program that reads Zarr v3; see `zarr_store` for remote ones."""
        return self.path / GROUP_NAME

    @cached_property
    def group_place(self) -> Place:
        """Where the Zarr group lies."""
        return self.place.within(GROUP_NAME)

    @cached_property
    def available(self) -> Bool[np.ndarray, " row"]:
        """Which rows are there: all of a finished store."""
        return np.ones(self.n_rows, bool)

    @property
    def zarr_store(self) -> Any:
        """What zarr-python and xarray open the group by, here or in an object store; damage raises."""
        return self.zarr_group(GROUP_NAME)

    @cached_property
    def group(self) -> "zarr.Group":
        """The Zarr group as zarr-python opens it."""
        import zarr

        return zarr.open_group(self.zarr_store, mode="r")

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

    def array(self, hook: str) -> RowArray:
        """Return the reader of one hook point's stored rows; raises HookPointError with near names."""
        if hook not in self._arrays:
            if hook not in self.hooks:
                raise HookPointError(
                    f"{self.id} holds no {hook!r}.{near_names(hook, self.hooks)} It holds {', '.join(self.hooks)}."
                )
            self._arrays[hook] = self._open_array(hook)
        return self._arrays[hook]

    def _open_array(self, hook: str) -> RowArray:
        folder = f"{GROUP_NAME}/{hook}/"
        names = [name for name in self.manifest.files if name.startswith(folder)]
        for name in names:
            if name.removeprefix(folder) in METADATA_FILES:
                self.check_file(name)
        checksums = {name.removeprefix(f"{GROUP_NAME}/"): self.manifest.files[name].checksum for name in names}
        return open_row_array(self.group_place, hook, checksums, self.zarr_store)

    @cached_property
    def _arrays(self) -> dict[str, RowArray]:
        return {}

    def read_rows(self, hook: str, start: int, stop: int) -> Float[np.ndarray, "row width"]:
        """Return rows `start` to `stop` (exclusive) in float32; raises IndexError outside the store."""
        array = self.array(hook)
        return decode(array.read(start, stop), array.layout.store_dtype)

    def take(self, hook: str, rows: Int[np.ndarray, " row"]) -> Float[np.ndarray, "row width"]:
        """Return the given rows, in their order, in float32."""
        array = self.array(hook)
        return decode(array.take(rows), array.layout.store_dtype)

    def blocks(self, hook: str, rows: int = 4096, where: str | None = None) -> Iterator[Block]:
        """Yield (row numbers, values in float32) of all rows in order, at most `rows` at a time, in constant memory.

        Only the rows that `where` picks are given, where it is (see `rows`). `values` is overwritten when the next
        block is asked for: copy what is to stay.
        """
        chosen = None if where is None else self.rows(where, hook)
        return read_blocks(self.array(hook), rows, chosen)

    @cached_property
    def prompt_offset(self) -> Int[np.ndarray, " prompt_edge"]:
        """Where each prompt's rows begin, and where the last prompt's end; int64."""
        return self._index_array("prompt_offset")

    @cached_property
    def prompt_idx(self) -> Int[np.ndarray, " row"]:
        """Prompt of each row, int32."""
        return self._index_array("prompt_idx")

    @cached_property
    def pos(self) -> Int[np.ndarray, " row"]:
        """Position of each row's token in its prompt, int32; 0 is BOS where the model has one."""
        return self._index_array("pos")

    @cached_property
    def token_id(self) -> Int[np.ndarray, " row"]:
        """Token of each row, int32."""
        return self._index_array("token_id")

    def _index_array(self, name: str) -> Int[np.ndarray, " n"]:
        array: Any = self.group[name]
        StoredChunks(self.group_place, array).require(0, array.shape[0])
        return np.asarray(array[:])

    def table(self, columns: list[str] | None = None) -> pd.DataFrame:
        """Return `tokens.parquet` or some of its columns: row, prompt_idx, pos, token_id, text, massive:<hook>."""
        return self.read_table(TOKENS_FILE, columns)

    @cached_property
    def prompts(self) -> pd.DataFrame:
        """`prompts.parquet` of the prompt set."""
        return self.read_table(PROMPTS_FILE)

    @cached_property
    def token_table(self) -> TokenTable:
        """`tokens.parquet` read block by block, for tables that do not fit into memory."""
        return TokenTable(self.file(TOKENS_FILE), self.file(PROMPTS_FILE))

    def massive(self, hook: str) -> Bool[np.ndarray, " row"]:
        """Say for each row whether its norm at a hook point is massive."""
        column = MASSIVE_PREFIX + self.array(hook).layout.name
        return self.table([column])[column].to_numpy(bool)

    def statistics(self, hook: str) -> HookStatistics:
        """Return mean, variance and norms of a hook point's rows, massive ones left out, and the covariance if kept."""
        from safetensors import safe_open

        name = self.array(hook).layout.name
        with safe_open(self.file(STATISTICS_FILE), framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys() if key.rpartition(".")[0] == name}  # noqa: SIM118
        return HookStatistics.from_tensors(tensors, name)

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

    def condition(self, where: str, hook: str | None = None) -> Condition:
        """Parse a condition on rows (see `mi_pipe/activations/where.py`), such as `token == ' Paris' and pos > 3`.

        Columns are those of `tokens.parquet` (`token` stands for `text`) and of `prompts.parquet`; `massive` says
        whether the row is massive at `hook`. Raises ConfigError for what has no meaning.
        """
        aliases = {"massive": MASSIVE_PREFIX + self.array(hook).layout.name} if hook else {}
        return self.token_table.condition(where, aliases)

    def rows(self, where: str | None = None, hook: str | None = None) -> Int[np.ndarray, " row"]:
        """Return the rows that fulfil a condition (all without one), ascending, int64.

        Only the columns that the condition names are read, block by block. Raises ConfigError as `condition` does.
        """
        if where is None:
            return np.arange(self.n_rows)
        return self.token_table.rows(self.condition(where, hook))

    def tokens(self, text: str) -> pd.DataFrame:
        """Return the table's lines whose token is just `text`, such as " Mary"; empty if there is none."""
        return self.token_table.take(self.rows(f"token == {text!r}")).set_index("row")

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

    def to_pandas(
        self, hook: str | Sequence[str], where: str | None = None, columns: Sequence[int] | None = None
    ) -> pd.DataFrame:
        """Return rows of a hook point as a frame: what is known of their tokens, then one column a value.

        `where` picks rows as `rows` does: `"token == ' Paris' and pos > 3"`. Only these rows are read. `columns`
        picks values. For a list of hook points the values' columns have two levels: `frame[hook][3]`. Raises
        ConfigError for a condition or column that has no meaning, HookPointError for an unknown hook point.
        """
        return frames.to_pandas(self, hook, where, columns)

    def mean(self, hook: str, where: str | None = None) -> Float[np.ndarray, " width"]:
        """Return the mean of the rows that `where` picks, massive ones left out; float64, in constant memory."""
        return summaries.mean(self, hook, where)

    def by_token(self, hook: str, where: str | None = None) -> pd.DataFrame:
        """Return how often each token occurs and how large its rows are, the most frequent first.

        Index `token_id`; `text`, `n_rows`, `n_massive`, `mean_norm`, `std_norm`, `max_norm`, and `mean_distance` from
        the mean of all rows. Reads the rows that `where` picks once, in constant memory.
        """
        return summaries.by_token(self, hook, where)

    def by_layer(self) -> pd.DataFrame:
        """Return norms, variance and effective dimensions of each hook point, from the stored statistics."""
        return summaries.by_layer(self)

    def content_of(self, name: str) -> str:
        """Say which rows of which array a file holds."""
        return agreement.content_of(self, name)

    def disagreements(self) -> list[Damage]:
        """Return the commit records and metadata that contradict the manifest or one another."""
        return agreement.disagreements(self)

    def __repr__(self) -> str:
        """Say what is in the store."""
        return describe.as_text(self)

    def _repr_html_(self) -> str:
        return describe.as_html(self)
