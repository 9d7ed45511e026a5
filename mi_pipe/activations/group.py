"""The Zarr v3 group: metadata of the hook points' arrays, and the small arrays that index their rows.

The group is built apart and put into place with everything in it but the shards, its own metadata last, so it is there
whole or not.
It opens with zarr, xarray and dask as it is; nothing in it changes while shards are added.
"""

import json
import shutil
from pathlib import Path
from typing import Any, cast

import numpy as np
import zarr
from jaxtyping import Shaped
from zarr.codecs import Crc32cCodec

from mi_pipe.activations.layout import ArrayLayout, StoreLayout
from mi_pipe.activations.storage_dtype import fill_value, numpy_dtype
from mi_pipe.core.place import LocalPlace, Place

GROUP_NAME = "activations.zarr"
SCHEMA = "mi_pipe.activations/2"
TOKEN_DIMENSION = "token"  # noqa: S105 (the dimension's name)
ROW_ARRAYS = ("token_id", "prompt_idx", "pos")
PROMPT_OFFSET = "prompt_offset"
_METADATA = "zarr.json"
_ROW_FILL = -1


def create_group(
    place: Place,
    building: Path,
    layout: StoreLayout,
    row_arrays: dict[str, Shaped[np.ndarray, " token"]],
    prompt_offset: Shaped[np.ndarray, " prompt_edge"],
    attributes: dict[str, Any],
) -> None:
    """Make the group at an artifact's place, by way of the local folder `building`."""
    shutil.rmtree(building, ignore_errors=True)
    group = zarr.create_group(building, zarr_format=3, attributes={"schema": SCHEMA, **attributes})
    for array in layout.arrays:
        _create_hook_array(group, array, layout.n_rows)
    for name in ROW_ARRAYS:
        _write_index(group, name, row_arrays[name].astype("<i4"), layout.shard_rows, TOKEN_DIMENSION)
    _write_index(group, PROMPT_OFFSET, prompt_offset.astype("<i8"), len(prompt_offset), "prompt_edge")
    built = LocalPlace(building)
    for key in sorted(built.keys(), key=lambda key: (key == _METADATA, key)):
        place.write(f"{GROUP_NAME}/{key}", built.read(key))
    shutil.rmtree(building)


def remove_group(place: Place) -> None:
    """Remove the group at an artifact's place, its metadata first, so that no half of it passes for whole."""
    place.remove(f"{GROUP_NAME}/{_METADATA}")
    for key in list(place.keys(GROUP_NAME)):
        place.remove(key)


def plan_of_group(place: Place) -> str | None:
    """Return the plan's hash in the attributes of the group at an artifact's place, or None if there is none.

    Neither is there one in a group of another version.
    """
    try:
        attributes = json.loads(place.read(f"{GROUP_NAME}/{_METADATA}"))["attributes"]
        return attributes["plan_hash"] if attributes["schema"] == SCHEMA else None
    except (FileNotFoundError, ValueError, KeyError):
        return None


def zarr_store(group: Place) -> Any:
    """Return what zarr-python and xarray open a group by."""
    if isinstance(group, LocalPlace):
        return str(group.root)
    from zarr.storage import ObjectStore

    from mi_pipe.core.object_place import ObjectPlace

    return ObjectStore(cast(ObjectPlace, group).store, read_only=True)


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
