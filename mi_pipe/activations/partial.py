"""An unfinished harvest, read as far as it has come: rows of committed shards, and never anything in place of others.

`available` says which rows are there. Asked for others, `read_rows`, `take` and `prompt` raise; `rows`, `blocks` and
`to_pandas` leave them out; `to_dask` and `to_xarray` have NaN for them, the latter beside a coordinate `available`.
What is known only of a whole store (statistics, massive rows, and so training) raises. A store is looked at when it is
opened; open it again to see what has been added.
"""

import tempfile
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int

from mi_pipe.activations.blocks import Block, read_blocks
from mi_pipe.activations.commits import Commit, committed
from mi_pipe.activations.committed_rows import NOT_COMMITTED, CommittedRows, MaskedRows, PartialGroup
from mi_pipe.activations.group import PROMPT_OFFSET, ROW_ARRAYS, TOKEN_DIMENSION
from mi_pipe.activations.layout import StoreLayout
from mi_pipe.activations.raw_array import RawArray, read_array_layout
from mi_pipe.activations.row_table import MASSIVE_PREFIX, TOKENS_FILE
from mi_pipe.activations.statistics import HookStatistics
from mi_pipe.activations.store import PROMPTS_FILE, ActivationStore
from mi_pipe.activations.token_table import TokenTable
from mi_pipe.activations.where import Condition
from mi_pipe.core.artifact import Artifact
from mi_pipe.core.canonical import content_hash
from mi_pipe.core.checked_zarr import plain_store
from mi_pipe.core.destination import destination_of, destination_place
from mi_pipe.core.errors import ArtifactIncompleteError
from mi_pipe.core.manifest import Manifest
from mi_pipe.core.place import LocalPlace, Place

if TYPE_CHECKING:
    import dask.array as da
    import xarray as xr


class PartialStore(ActivationStore):
    """The committed shards of a harvest that is not finished."""

    is_partial = True

    def __init__(self, path: Path, request: Manifest, prompts: Artifact | None = None) -> None:
        """Look at the unfinished harvest in `path`, begun as `request` says; `prompts` is its prompt set, if known."""
        super().__init__(path, request)
        self._prompt_set = prompts

    def __reduce__(self) -> tuple[Any, ...]:
        """Travel to other processes as what it was opened by."""
        return type(self), (self.path, self.manifest, self._prompt_set)

    @cached_property
    def place(self) -> Place:
        """Where the shards lie."""
        destination = destination_of(self.manifest.execution)
        return LocalPlace(self.path) if destination is None else destination_place(destination, self.id)

    @cached_property
    def available(self) -> Bool[np.ndarray, " row"]:
        """Which rows are there."""
        mask = np.zeros(self.n_rows, bool)
        for commit in self._commits.values():
            mask[slice(*commit.rows)] = True
        return mask

    @property
    def zarr_store(self) -> Any:
        """The group for zarr-python and xarray; asked for a shard that is not there, it raises."""
        known: dict[str, str | None] = dict.fromkeys(self._index_keys())
        shards = range(self._layout.n_shards)
        known |= {array.key(shard): NOT_COMMITTED for array in self._layout.arrays for shard in shards}
        known |= self._checksums
        return PartialGroup(plain_store(self.group_place), self.group_place, known, self.id)

    @cached_property
    def _attributes(self) -> dict[str, Any]:
        import zarr

        return dict(zarr.open_group(plain_store(self.group_place), mode="r").attrs)

    @cached_property
    def _layout(self) -> StoreLayout:
        arrays = tuple(read_array_layout(self.group_place, hook)[0] for hook in self.hooks)
        return StoreLayout(self.n_rows, self.shard_rows, arrays)

    @cached_property
    def _commits(self) -> dict[int, Commit]:
        plan = self._attributes["plan_hash"]
        found = {shard: committed(self.place, self._layout, plan, shard) for shard in range(self._layout.n_shards)}
        return {shard: commit for shard, commit in found.items() if commit is not None}

    @cached_property
    def _checksums(self) -> dict[str, str]:
        return {key: checksum for commit in self._commits.values() for key, (_, checksum) in commit.files.items()}

    def _index_keys(self) -> list[str]:
        chunks = range(self._layout.n_shards)
        return [f"{name}/c/{chunk}" for name in ROW_ARRAYS for chunk in chunks] + [f"{PROMPT_OFFSET}/c/0"]

    def _open_array(self, hook: str) -> CommittedRows:
        return CommittedRows(RawArray(self.group_place, hook, checksums=self._checksums), self)

    def rows(self, where: str | None = None, hook: str | None = None) -> Int[np.ndarray, " row"]:
        """Return the rows that are there and fulfil a condition, ascending, int64."""
        found = super().rows(where, hook)
        return found[self.available[found]]

    def blocks(self, hook: str, rows: int = 4096, where: str | None = None) -> Iterator[Block]:
        """Yield (row numbers, values) of the rows that are there, as `ActivationStore.blocks` does."""
        return read_blocks(self.array(hook), rows, self.rows(where, hook))

    def condition(self, where: str, hook: str | None = None) -> Condition:
        """Parse a condition; raises ArtifactIncompleteError if it asks which rows are massive."""
        found = super().condition(where, hook)
        if any(column.startswith(MASSIVE_PREFIX) for column in found.columns):
            self.refuse("Which rows are massive")
        return found

    def to_dask(self, hook: str) -> "da.Array":
        """Return one hook point as a lazy dask array, NaN where `available` is False."""
        import dask.array as da

        name = content_hash([self._attributes["plan_hash"], sorted(self._commits), hook])
        layout = self.array(hook).layout
        chunks: Any = (layout.shard_rows, layout.width)
        return da.from_array(MaskedRows(self, hook), chunks=chunks, name=f"partial-{name}", asarray=False)

    def to_xarray(self) -> "xr.Dataset":
        """Return all hook points as one lazy data set, with a coordinate that says which rows are available."""
        return super().to_xarray().assign_coords(available=(TOKEN_DIMENSION, self.available))

    def file(self, name: str) -> Path:
        """Return the path of a file that is there already; raises ArtifactIncompleteError for others."""
        if not (self.path / name).exists():
            self.refuse(name)
        return self.path / name

    def table(self, columns: list[str] | None = None) -> pd.DataFrame:
        """Return the lines of the rows that are there: row, prompt_idx, pos, token_id, text."""
        return self.token_table.take(self.rows(), columns)

    @cached_property
    def prompts(self) -> pd.DataFrame:
        """`prompts.parquet` of the prompt set."""
        return pd.read_parquet(self._of_prompts(PROMPTS_FILE))

    @cached_property
    def token_table(self) -> TokenTable:
        """The token table of all rows, made for the while from the index arrays and the prompt set."""
        texts = pd.read_parquet(self._of_prompts(TOKENS_FILE), columns=["prompt_idx", "pos", "text"])
        index = {"prompt_idx": self.prompt_idx, "pos": self.pos, "token_id": self.token_id}
        lines = pd.DataFrame({"row": np.arange(self.n_rows), **index}).merge(texts, "left", on=["prompt_idx", "pos"])
        self._folder = tempfile.TemporaryDirectory(prefix="mi-pipe-")
        path = Path(self._folder.name) / TOKENS_FILE
        lines.astype({"text": "category"}).to_parquet(path, index=False)
        return TokenTable(path, self._of_prompts(PROMPTS_FILE))

    def _of_prompts(self, name: str) -> Path:
        if self._prompt_set is None:
            self.refuse(f"The text of the rows ({name})")
        return self._prompt_set.file(name)

    def massive(self, hook: str) -> NoReturn:
        """Raise ArtifactIncompleteError: a row is massive by the median of all rows."""
        del hook
        self.refuse("Which rows are massive")

    def statistics(self, hook: str) -> HookStatistics:
        """Raise ArtifactIncompleteError: statistics are of all rows."""
        del hook
        self.refuse("What the statistics are")

    def mean(self, hook: str, where: str | None = None) -> Float[np.ndarray, " width"]:
        """Raise ArtifactIncompleteError: massive rows are not known."""
        del where
        return self.massive(hook)

    def refuse(self, what: str) -> NoReturn:
        """Raise ArtifactIncompleteError for something that is known only when all shards are there."""
        raise ArtifactIncompleteError(
            f"{what} is known only when {self.id} is finished; {len(self._commits):,} of {self._layout.n_shards:,} "
            f"shards are there. Run its recipe again, or `mi-pipe repair {self.id}`, to go on."
        )

    def __repr__(self) -> str:
        """Say how far it is."""
        return f"<{len(self._commits):,} of {self._layout.n_shards:,} shards of an {super().__repr__()[1:]}"
