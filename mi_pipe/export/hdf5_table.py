"""Tables as HDF5: a group with one dataset a column, each chunked and with Fletcher-32 checksums.

Numbers and flags are datasets of their own type. A column of strings is stored once a distinct string: dataset `<name>`
has for each row the line of `<name>:values` (UTF-8, fixed length), -1 where the string is missing; `<name>:bytes` are
the lengths, for strings that end in NUL, which HDF5 cuts. Where numbers are missing, `<name>:missing` flags them.

    with h5py.File("acts.h5") as file:
        text = file["tokens/text:values"].asstr()[:][file["tokens/text"][:]]

The Parquet schema is an attribute of the group, so that a table comes back as it was, types and order included.
"""

from collections.abc import Iterable
from typing import Any, cast

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Shaped

from mi_pipe.core.errors import ArtifactDamagedError

VALUES, BYTES, MISSING = ":values", ":bytes", ":missing"
_SCHEMA = "arrow_schema"
_CHUNK_ROWS = 1 << 16
_MISSING_TEXT = -1


def write_table(parent: h5py.Group, name: str, file: pq.ParquetFile) -> None:
    """Write a Parquet table as the group `name`, a row group at a time; raises TypeError for nested columns."""
    group = parent.create_group(name)
    schema = file.schema_arrow
    group.attrs[_SCHEMA] = np.void(schema.serialize().to_pybytes())
    columns = {field.name: _column(group, field, file.metadata.num_rows) for field in schema}
    start = 0
    for number in range(file.num_row_groups):
        table = file.read_row_group(number)
        for field in schema:
            columns[field.name].put(start, table.column(field.name))
        start += len(table)
    for column in columns.values():
        column.finish()


def read_table(group: h5py.Group) -> pa.Table:
    """Return a table that `write_table` wrote; raises ArtifactDamagedError if a part of it is not there."""
    try:
        schema = pa.ipc.read_schema(pa.py_buffer(cast(Any, group.attrs[_SCHEMA]).tobytes()))
        return pa.table([_read(group, field) for field in schema], schema=schema)
    except (KeyError, ValueError, OSError, pa.ArrowInvalid) as error:
        raise ArtifactDamagedError(
            f"The table {group.name} of {group.file.filename} cannot be read: {error}."
        ) from error


def has_table(group: h5py.Group) -> bool:
    """Say whether `write_table` wrote this group."""
    return _SCHEMA in group.attrs


def dataset(group: h5py.Group, name: str, values: Shaped[np.ndarray, "row *rest"]) -> h5py.Dataset:
    """Write a small array whole, chunked and with checksums."""
    if len(values) == 0:
        return group.create_dataset(name, values.shape, values.dtype)
    chunks = (min(len(values), _CHUNK_ROWS), *values.shape[1:])
    return group.create_dataset(name, values.shape, values.dtype, values, chunks=chunks, fletcher32=True)


class _Numbers:
    """A column of numbers or flags."""

    def __init__(self, group: h5py.Group, name: str, dtype: np.dtype, n_rows: int) -> None:
        self._group = group
        self._name = name
        self._values = _empty(group, name, dtype, n_rows)

    def put(self, start: int, column: pa.ChunkedArray) -> None:
        """Write rows from `start` on."""
        stop = start + len(column)
        if column.null_count:
            self._missing()[start:stop] = column.is_null().to_numpy()
            column = column.fill_null(False if self._values.dtype == bool else 0)
        self._values[start:stop] = column.to_numpy()

    def _missing(self) -> h5py.Dataset:
        name = self._name + MISSING
        if name not in self._group:
            _empty(self._group, name, np.dtype(bool), len(self._values))
        return cast(h5py.Dataset, self._group[name])

    def finish(self) -> None:
        """Nothing is left to write."""


class _Strings:
    """A column of strings by reference."""

    def __init__(self, group: h5py.Group, name: str, n_rows: int) -> None:
        self._group = group
        self._name = name
        self._codes = _empty(group, name, np.dtype(np.int32), n_rows)
        self._known: dict[str, int] = {}

    def put(self, start: int, column: pa.ChunkedArray) -> None:
        """Write rows from `start` on."""
        encoded: Any = column if pa.types.is_dictionary(column.type) else column.dictionary_encode()
        array = encoded.unify_dictionaries().combine_chunks()
        codes = [self._known.setdefault(text, len(self._known)) for text in array.dictionary.to_pylist()]
        found = array.indices.fill_null(_MISSING_TEXT).to_numpy(zero_copy_only=False)
        self._codes[start : start + len(column)] = np.array([*codes, _MISSING_TEXT], np.int32)[found]

    def finish(self) -> None:
        """Write the distinct strings."""
        texts = [text.encode() for text in self._known]
        lengths = np.array([len(text) for text in texts], np.int32)
        longest = max(1, int(lengths.max(initial=1)))
        values = np.array(texts, h5py.string_dtype("utf-8", longest))
        dataset(self._group, self._name + VALUES, values)
        dataset(self._group, self._name + BYTES, lengths)


def _column(group: h5py.Group, field: pa.Field, n_rows: int) -> _Numbers | _Strings:
    kind = field.type
    if pa.types.is_dictionary(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return _Strings(group, field.name, n_rows)
    return _Numbers(group, field.name, np.dtype(kind.to_pandas_dtype()), n_rows)


def _empty(group: h5py.Group, name: str, dtype: np.dtype, n_rows: int) -> h5py.Dataset:
    return group.create_dataset(name, (n_rows,), dtype, chunks=(max(1, min(n_rows, _CHUNK_ROWS)),), fletcher32=True)


def _read(group: h5py.Group, field: pa.Field) -> pa.Array:
    values = _array(group, field.name)
    if field.name + VALUES not in group:
        missing = _array(group, field.name + MISSING) if field.name + MISSING in group else None
        return pa.array(values, type=field.type, mask=missing)
    texts = pa.array(strings(group, field.name), pa.string())
    codes = pa.array(values, mask=values == _MISSING_TEXT)
    found = pa.DictionaryArray.from_arrays(codes, texts)
    return found.cast(field.type) if pa.types.is_dictionary(field.type) else texts.take(codes).cast(field.type)


def strings(group: h5py.Group, name: str) -> list[str]:
    """Return the distinct strings of a column, those that end in NUL included."""
    stored, lengths = _array(group, name + VALUES), _array(group, name + BYTES)
    width = stored.dtype.itemsize
    data = stored.tobytes()
    return [data[i * width : i * width + int(n)].decode() for i, n in enumerate(lengths)]


def _array(group: h5py.Group, name: str) -> Shaped[np.ndarray, "row *rest"]:
    return cast(h5py.Dataset, group[name])[:]


def labelled(names: Iterable[str]) -> np.ndarray:
    """Return names as an HDF5 attribute holds them."""
    return np.array(list(names), h5py.string_dtype("utf-8"))
