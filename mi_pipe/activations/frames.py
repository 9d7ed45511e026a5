"""Stored activations in analysts' types: xarray, dask and pandas; lazy where the data is large.

Values always come through the store's own readers, so that a missing or altered shard raises ArtifactDamagedError,
where zarr-python would answer a missing file with NaN.
"""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Int, Shaped

from mi_pipe.activations.group import PROMPT_OFFSET, ROW_ARRAYS, TOKEN_DIMENSION
from mi_pipe.activations.row_table import MASSIVE_PREFIX
from mi_pipe.activations.storage_dtype import decode, numpy_dtype
from mi_pipe.core.artifact import format_size
from mi_pipe.core.errors import ConfigError

if TYPE_CHECKING:
    import dask.array as da
    import xarray as xr

    from mi_pipe.activations.store import ActivationStore

Hooks = str | Sequence[str]
_TABLE_COLUMNS = ["row", "prompt_idx", "pos", "token_id", "text"]
_PIECE_ROWS = 8192
_VALUE_BYTES = 4


def to_xarray(store: "ActivationStore") -> "xr.Dataset":
    """Return all hook points as one lazy data set; bfloat16 is decoded to float32.

    The coordinates token_id, prompt_idx and pos are read when they are first used.
    """
    import xarray as xr

    opened = xr.open_zarr(store.zarr_store, consolidated=False, chunks=None).drop_vars(PROMPT_OFFSET)
    values = {hook: (opened[hook].dims, store.to_dask(hook), opened[hook].attrs) for hook in store.hooks}
    return opened.drop_vars(store.hooks).assign(values)


def to_dask(store: "ActivationStore", hook: str) -> "da.Array":
    """Return one hook point as a lazy dask array, one task a shard, of which only the rows asked for are read."""
    import dask.array as da

    layout = store.array(hook).layout
    chunks: Any = (layout.shard_rows, layout.width)
    name = f"activations-{store.digest}-{hook}"
    return da.from_array(_Rows(store, hook), chunks=chunks, name=name, asarray=False)


class _Rows:
    """A hook point as dask slices it."""

    ndim = 2

    def __init__(self, store: "ActivationStore", hook: str) -> None:
        self._store = store
        self._hook = hook
        self.shape = (store.n_rows, store.width(hook))
        self.dtype = np.dtype(np.float32) if store.dtype == "bfloat16" else numpy_dtype(store.dtype)

    def __getitem__(self, index: tuple[slice, slice]) -> Shaped[np.ndarray, "row width"]:
        rows, columns = index
        start, stop, step = rows.indices(self.shape[0])
        stored = self._store.array(self._hook).read(start, max(start, stop))[::step, columns]
        return decode(stored, "bfloat16") if self._store.dtype == "bfloat16" else stored


def to_pandas(store: "ActivationStore", hook: Hooks, where: str | None, columns: Sequence[int] | None) -> pd.DataFrame:
    """Return the rows that `where` picks of one hook point, or of several, after what is known of their tokens."""
    hooks = [hook] if isinstance(hook, str) else list(hook)
    picked = {name: _columns(store, name, columns) for name in hooks}
    rows = store.rows(where, hooks[0] if len(hooks) == 1 else None)
    _check_memory(store, len(rows), sum(map(len, picked.values())))
    flags = [MASSIVE_PREFIX + name for name in hooks if MASSIVE_PREFIX + name in store.token_table.columns]
    frame = store.token_table.take(rows, [*_TABLE_COLUMNS, *flags])
    frame = frame.set_index("row")
    parts = [
        pd.DataFrame(_values(store, name, rows, chosen), index=frame.index, columns=chosen)
        for name, chosen in picked.items()
    ]
    if isinstance(hook, str):
        return pd.concat([frame, *parts], axis="columns")
    frame.columns = pd.MultiIndex.from_product([frame.columns, [""]])
    for name, part in zip(hooks, parts, strict=True):
        part.columns = pd.MultiIndex.from_product([[name], part.columns])
    return pd.concat([frame, *parts], axis="columns")


def _columns(store: "ActivationStore", hook: str, columns: Sequence[int] | None) -> list[int]:
    """Return the numbers of the values asked for; raises ConfigError for one the hook point does not have."""
    width = store.width(hook)
    chosen = list(range(width)) if columns is None else list(columns)
    for column in chosen:
        if not isinstance(column, int | np.integer) or isinstance(column, bool) or not 0 <= column < width:
            raise ConfigError(f"{hook!r} has values 0 to {width - 1}; there is no column {column!r}.")
    return [int(column) for column in chosen]


def _check_memory(store: "ActivationStore", n_rows: int, n_values: int) -> None:
    """Raise ConfigError if the values would not fit into this machine's memory at all."""
    needed = n_rows * n_values * _VALUE_BYTES
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > memory:
        raise ConfigError(
            f"{n_rows:,} rows of {store.id} with {n_values:,} values take {format_size(needed)} and this machine has "
            f"{format_size(memory)}: ask for fewer with where= and columns=, or use to_dask or to_xarray."
        )


def _values(
    store: "ActivationStore", hook: str, rows: Int[np.ndarray, " row"], columns: list[int]
) -> Float[np.ndarray, "row column"]:
    """Read rows piece by piece, so that only the columns asked for are in memory for all rows."""
    out = np.empty((len(rows), len(columns)), np.float32)
    if not columns:
        return out
    for start in range(0, len(rows), _PIECE_ROWS):
        piece = store.take(hook, rows[start : start + _PIECE_ROWS])
        out[start : start + len(piece)] = piece if columns == list(range(piece.shape[1])) else piece[:, columns]
    return out


def prompt_dataset(store: "ActivationStore", start: int, stop: int) -> "xr.Dataset":
    """Return rows `start` to `stop` of every hook point, in memory, in float32."""
    import xarray as xr

    variables: dict[str, Any] = {
        hook: ((TOKEN_DIMENSION, store.array(hook).layout.dimension), store.read_rows(hook, start, stop))
        for hook in store.hooks
    }
    table = store.token_table.take(np.arange(start, stop), _TABLE_COLUMNS)
    coordinates: dict[str, Any] = {name: (TOKEN_DIMENSION, table[name].to_numpy()) for name in ROW_ARRAYS}
    text = table["text"].astype(str).to_numpy(object)
    return xr.Dataset(variables, {**coordinates, "text": (TOKEN_DIMENSION, text)})
