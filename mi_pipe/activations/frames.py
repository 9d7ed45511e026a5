"""Stored activations in analysts' types: xarray, dask and pandas; lazy where the data is large."""

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from jaxtyping import Shaped

from mi_pipe.activations.group import PROMPT_OFFSET, ROW_ARRAYS, TOKEN_DIMENSION
from mi_pipe.activations.storage_dtype import decode
from mi_pipe.core.errors import ConfigError

if TYPE_CHECKING:
    import dask.array as da
    import xarray as xr

    from mi_pipe.activations.store import ActivationStore


def to_xarray(store: "ActivationStore") -> "xr.Dataset":
    """Return all hook points as one lazy data set; bfloat16 is decoded to float32."""
    import xarray as xr

    chunks: Any = {TOKEN_DIMENSION: store.shard_rows}
    dataset = xr.open_zarr(store.group_path, consolidated=False, chunks=chunks).drop_vars(PROMPT_OFFSET)
    if store.dtype == "bfloat16":
        dataset = dataset.assign({hook: (dataset[hook].dims, to_dask(store, hook)) for hook in store.hooks})
    return dataset[store.hooks]


def to_dask(store: "ActivationStore", hook: str) -> "da.Array":
    """Return one hook point as a lazy dask array, one task a shard."""
    import dask.array as da

    layout = store.array(hook).layout
    array = da.from_zarr(store.group[hook], chunks=(layout.shard_rows, layout.width))
    return array.map_blocks(_decode_bfloat16, dtype=np.float32) if store.dtype == "bfloat16" else array


def _decode_bfloat16(bits: Shaped[np.ndarray, "*shape"]) -> Shaped[np.ndarray, "*shape"]:
    return decode(bits, "bfloat16")


def to_pandas(store: "ActivationStore", hook: str, where: str | None, columns: list[int] | None) -> pd.DataFrame:
    """Return the rows of a hook point that `where` picks, with the columns of the token table before them."""
    table = store.table()
    if where is not None:
        try:
            picked = table.assign(token=table["text"]).query(where)
        except Exception as error:
            raise ConfigError(
                f"The condition {where!r} cannot be evaluated ({error}). "
                "It is a pandas query on row, prompt_idx, pos, token_id, token and massive:<hook> (in backticks)."
            ) from error
        table = table.loc[picked.index]
    values = store.take(hook, table["row"].to_numpy(np.int64))
    names = list(range(values.shape[1])) if columns is None else columns
    frame = pd.DataFrame(values[:, names], index=table.index, columns=names)
    return pd.concat([table, frame], axis="columns").set_index("row")


def prompt_dataset(store: "ActivationStore", start: int, stop: int) -> "xr.Dataset":
    """Return rows `start` to `stop` of every hook point, in memory, in float32."""
    import xarray as xr

    variables = {
        hook: ((TOKEN_DIMENSION, store.array(hook).layout.dimension), store.read_rows(hook, start, stop))
        for hook in store.hooks
    }
    text = store.table(["text"])["text"].iloc[start:stop].astype(str).to_numpy(object)
    coordinates = {name: (TOKEN_DIMENSION, getattr(store, name)[start:stop]) for name in ROW_ARRAYS}
    return xr.Dataset(variables, {**coordinates, "text": (TOKEN_DIMENSION, text)})
