"""Reads the rows of arrays that others wrote (any codecs, chunks or version of Zarr) through zarr-python.

The same rows in the same way as `RawArray`, at 0.3 to 1 of a million rows a second instead of several: chunks are
decoded one at a time, which is where zarr-python is fastest. A missing chunk raises ArtifactDamagedError instead of
being read as fill values (`stored_chunks`). Values of several axes are given flat, float64 as float32.
"""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Int, Shaped

from mi_pipe.activations.group import zarr_store
from mi_pipe.activations.layout import ArrayLayout
from mi_pipe.activations.raw_array import RawArray
from mi_pipe.activations.row_array import RowArray, read_rows, require_rows, take_rows
from mi_pipe.activations.storage_dtype import StoreDType
from mi_pipe.activations.stored_chunks import StoredChunks
from mi_pipe.core.errors import ArtifactDamagedError, ConfigError, MiPipeError
from mi_pipe.core.place import Place

METADATA_FILES = ("zarr.json", ".zarray", ".zattrs")
"""What describes an array, of either version of Zarr."""
_STORE_DTYPES: dict[str, StoreDType] = {"float16": "float16", "float32": "float32", "float64": "float32"}


def open_row_array(group: Place, name: str, checksums: Mapping[str, str] | None = None, store: Any = None) -> RowArray:
    """Return the direct reader of an array laid out as mi_pipe writes, and zarr-python's of any other.

    Where they are known, `checksums` are those of the array's files, by key of the group, and `store` is what zarr
    reads the group by, such as one that compares these checksums.
    Raises ArtifactDamagedError if its metadata cannot be read, ConfigError if it holds no activations.
    """
    return ZarrArray(group, name, store) if _is_foreign(group, name) else RawArray(group, name, checksums=checksums)


class ZarrArray:
    """One hook point's array (token, ...) in a group, as zarr-python decodes it."""

    def __init__(self, group: Place, name: str, store: Any = None) -> None:
        """Open the array `name` of `group`, through `store` or plainly; raises as `open_row_array` does."""
        import zarr

        self._name = f"{group.url}/{name}"
        try:
            self._array: Any = zarr.open_array(store or zarr_store(group), path=name, mode="r")
        except MiPipeError:
            raise
        except Exception as error:
            raise ArtifactDamagedError(f"{self._name} cannot be opened as a Zarr array ({error}).") from error
        self.layout = _layout(self._array, name)
        self.n_rows = int(self._array.shape[0])
        self._chunks = StoredChunks(group, self._array)

    def read(self, start: int, stop: int) -> Shaped[np.ndarray, "row width"]:
        """Return stored rows `start` to `stop` (exclusive)."""
        return read_rows(self, start, stop)

    def read_into(self, out: Shaped[np.ndarray, "row width"], start: int) -> None:
        """Fill `out` with rows from `start` on; raises IndexError outside."""
        stop = start + len(out)
        require_rows(self, start, stop)
        self._chunks.require(start, stop)
        size, row = self.layout.chunk_rows, start
        while row < stop:
            end = min(stop, (row // size + 1) * size)
            out[row - start : end - start] = self._decoded(row, end)
            row = end

    def take(self, rows: Int[np.ndarray, " row"]) -> Shaped[np.ndarray, "row width"]:
        """Return stored rows in any order, repeats allowed; each chunk that holds one is decoded once."""
        return take_rows(self, rows)

    def _decoded(self, start: int, stop: int) -> Shaped[np.ndarray, "row width"]:
        try:
            return np.asarray(self._array[start:stop]).reshape(stop - start, self.layout.width)
        except (MiPipeError, OSError):
            raise
        except Exception as error:
            raise ArtifactDamagedError(
                f"Rows {start:,} to {stop:,} of {self._name} cannot be decoded ({error})."
            ) from error


def _layout(array: Any, name: str) -> ArrayLayout:
    is_bfloat16 = array.attrs.get("logical_dtype") == "bfloat16" and array.dtype.name == "uint16"
    store_dtype = "bfloat16" if is_bfloat16 else _STORE_DTYPES.get(array.dtype.name)
    if store_dtype is None or len(array.shape) <= 1:
        raise ConfigError(
            f"{name} holds {array.dtype.name} of shape {array.shape}; activations are (token, ...) and float16, "
            "float32, float64, or uint16 with the attribute logical_dtype: bfloat16."
        )
    names = getattr(array.metadata, "dimension_names", None) or ()
    named = [dimension for dimension in names[1:] if dimension]
    shape = tuple(int(n) for n in array.shape[1:])
    return ArrayLayout(
        name=name,
        token_shape=tuple(array.attrs.get("token_shape", shape)),
        dimension="_".join(named) or f"width_{int(np.prod(shape))}",
        store_dtype=store_dtype,
        chunk_rows=int(array.chunks[0]),
        shard_rows=int((array.shards or array.chunks)[0]),
    )


def _is_foreign(group: Place, name: str) -> bool:
    """Say whether an array has metadata of Zarr, and other than `group.create_group` gives it."""
    try:
        meta = json.loads(group.read(f"{name}/zarr.json"))
    except FileNotFoundError:
        return group.size(f"{name}/.zarray") is not None
    except ValueError:
        return False
    try:
        codec = meta["codecs"][0]["configuration"]
        inner = [(item["name"], item.get("configuration", {}).get("endian")) for item in codec["codecs"]]
        width = meta["shape"][1]
        return not (
            len(meta["codecs"]) == 1
            and inner == [("bytes", "little"), ("crc32c", None)]
            and codec["index_location"] == "end"
            and codec["chunk_shape"][1] == meta["chunk_grid"]["configuration"]["chunk_shape"][1] == width
            and {"token_shape", "coordinates"} <= meta["attributes"].keys()
        )
    except (KeyError, IndexError, TypeError, AttributeError):
        return True
