"""The Zarr v3 group: metadata of the hook points' arrays, and the small arrays that index their rows.

The group is built apart and renamed into place with everything in it but the shards, so it is there whole or not.
It opens with zarr, xarray and dask as it is; nothing in it changes while shards are added.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from jaxtyping import Shaped
from zarr.codecs import Crc32cCodec

from mi_pipe.activations.layout import ArrayLayout, StoreLayout
from mi_pipe.activations.storage_dtype import fill_value, numpy_dtype
from mi_pipe.core.atomic import fsync_folder

GROUP_NAME = "activations.zarr"
SCHEMA = "mi_pipe.activations/1"
TOKEN_DIMENSION = "token"  # noqa: S105 (the dimension's name)
ROW_ARRAYS = ("token_id", "prompt_idx", "pos")
PROMPT_OFFSET = "prompt_offset"
_ROW_FILL = -1


def create_group(
    path: Path,
    building: Path,
    layout: StoreLayout,
    row_arrays: dict[str, Shaped[np.ndarray, " token"]],
    prompt_offset: Shaped[np.ndarray, " prompt_edge"],
    attributes: dict[str, Any],
) -> None:
    """Make the group at `path`, by way of the folder `building` on the same disk; nothing is left half-made."""
    shutil.rmtree(building, ignore_errors=True)
    group = zarr.create_group(building, zarr_format=3, attributes={"schema": SCHEMA, **attributes})
    for array in layout.arrays:
        _create_hook_array(group, array, layout.n_rows)
    for name in ROW_ARRAYS:
        _write_index(group, name, row_arrays[name].astype("<i4"), layout.shard_rows, TOKEN_DIMENSION)
    _write_index(group, PROMPT_OFFSET, prompt_offset.astype("<i8"), len(prompt_offset), "prompt_edge")
    _make_durable(building)
    path.parent.mkdir(parents=True, exist_ok=True)
    building.rename(path)
    fsync_folder(path.parent)


def plan_of_group(path: Path) -> str | None:
    """Return the plan's hash in a group's attributes, or None if they cannot be read."""
    try:
        return json.loads((path / "zarr.json").read_bytes())["attributes"]["plan_hash"]
    except (OSError, ValueError, KeyError):
        return None


def _create_hook_array(group: zarr.Group, array: ArrayLayout, n_rows: int) -> None:
    attributes: dict[str, Any] = {"coordinates": " ".join(ROW_ARRAYS), "token_shape": list(array.token_shape)}
    if array.store_dtype == "bfloat16":
        attributes["logical_dtype"] = "bfloat16"
    group.create_array(
        array.name,
        shape=(n_rows, array.width),
        dtype=numpy_dtype(array.store_dtype),
        chunks=(array.chunk_rows, array.width),
        shards=(array.shard_rows, array.width),
        filters=None,
        compressors=[Crc32cCodec()],
        fill_value=fill_value(array.store_dtype),
        dimension_names=[TOKEN_DIMENSION, array.dimension],
        attributes=attributes,
        config={"write_empty_chunks": True},
    )


def _write_index(
    group: zarr.Group, name: str, values: Shaped[np.ndarray, " n"], chunk_rows: int, dimension: str
) -> None:
    array = group.create_array(
        name,
        shape=values.shape,
        dtype=values.dtype,
        chunks=(chunk_rows,),
        filters=None,
        compressors=[Crc32cCodec()],
        fill_value=_ROW_FILL,
        dimension_names=[dimension],
        config={"write_empty_chunks": True},
    )
    array[:] = values


def _make_durable(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir():
            fsync_folder(path)
        else:
            with path.open("rb") as file:
                os.fsync(file.fileno())
    fsync_folder(folder)
