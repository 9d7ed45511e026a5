"""Arrays in files of other programs, read by rows: NumPy's `.npy`, safetensors, HDF5. Nothing is ever unpickled.

A file holds one array (`.npy`) or several by name. `open_dump` says which and gives each as a `DumpArray`, whose rows
come as torch tensors of the dtype in the file; bfloat16 is safetensors' own, or in HDF5 uint16 with the attribute
`logical_dtype: bfloat16`.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Shaped
from torch import Tensor

from mi_pipe.core.errors import ArtifactDamagedError, ConfigError

SUFFIXES = {".npy": "npy", ".safetensors": "safetensors", ".h5": "hdf5", ".hdf5": "hdf5"}
_TORCH_NAMES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
_NPY_MAGIC = b"\x93NUMPY"
_MATRIX_DIMS = 2


class DumpArray(Protocol):
    """An array (row, …) in a file."""

    label: str
    """File and name, for messages."""
    shape: tuple[int, ...]
    dtype: torch.dtype | None
    """None if the values are not floating-point numbers of a known kind."""

    def read(self, start: int, stop: int) -> Shaped[Tensor, "row *rest"]:
        """Return rows `start` to `stop` (exclusive)."""
        ...


def kind_of(path: Path) -> str:
    """Return npy, safetensors or hdf5; raises ConfigError for another suffix or a file that is not there."""
    if path.suffix not in SUFFIXES:
        hint = " Save the array alone as .npy." if path.suffix in (".npz", ".pt", ".pth", ".pkl") else ""
        raise ConfigError(f"{path} is none of {', '.join(SUFFIXES)} by its name.{hint}")
    if not path.is_file():
        raise ConfigError(f"There is no file {path}.")
    return SUFFIXES[path.suffix]


def open_dump(path: Path) -> Mapping[str, DumpArray]:
    """Return the arrays of a file by name ("" for a `.npy`), those with one dimension or none left out.

    Raises ConfigError if the file cannot be read as what its name says.
    """
    openers = {"npy": _open_npy, "safetensors": _open_safetensors, "hdf5": _open_hdf5}
    kind = kind_of(path)
    try:
        arrays = openers[kind](path)
    except Exception as error:
        raise ConfigError(f"{path} cannot be read as {kind} ({error}).") from error
    return {name: array for name, array in arrays.items() if len(array.shape) >= _MATRIX_DIMS}


class _Numpy:
    """An array that NumPy or h5py slices."""

    def __init__(self, label: str, array: Any, is_bfloat16: bool = False) -> None:
        self.label = label
        self.shape = tuple(int(n) for n in array.shape)
        self.dtype = torch.bfloat16 if is_bfloat16 else _torch_dtype(array.dtype)
        self._array = array
        self._is_bfloat16 = is_bfloat16

    def read(self, start: int, stop: int) -> Shaped[Tensor, "row *rest"]:
        try:
            values = np.ascontiguousarray(self._array[start:stop])
        except OSError as error:
            raise ArtifactDamagedError(
                f"Rows {start:,} to {stop:,} of {self.label} cannot be read: {error}."
            ) from error
        if self._is_bfloat16:
            return torch.from_numpy(values.astype("<u2").view(np.int16)).view(torch.bfloat16)
        values = values.astype(values.dtype.newbyteorder("="), copy=False)
        return torch.from_numpy(values if values.flags.writeable else values.copy())


class _FileRows:
    """A `.npy` array in C order, whose rows are read; mapped, each page would stay in memory once it was touched."""

    def __init__(self, path: Path, mapped: np.memmap) -> None:
        self.shape, self.dtype = mapped.shape, mapped.dtype
        self._path = path
        self._offset = mapped.offset
        self._row_items = int(np.prod(mapped.shape[1:]))

    def __getitem__(self, rows: slice) -> Shaped[np.ndarray, "row *rest"]:
        offset = self._offset + rows.start * self._row_items * self.dtype.itemsize
        count = (rows.stop - rows.start) * self._row_items
        return np.fromfile(self._path, self.dtype, count, offset=offset).reshape(-1, *self.shape[1:])


class _Safetensors:
    """A tensor of a safetensors file."""

    def __init__(self, path: Path, key: str) -> None:
        from safetensors import safe_open

        self.label = f"{key!r} of {path}"
        file: Any = safe_open(str(path), framework="pt")
        self._slice = file.get_slice(key)
        self.shape = tuple(self._slice.get_shape())
        self.dtype = _TORCH_NAMES.get(self._slice.get_dtype())

    def read(self, start: int, stop: int) -> Shaped[Tensor, "row *rest"]:
        return self._slice[start:stop]


def _open_npy(path: Path) -> dict[str, DumpArray]:
    with path.open("rb") as file:
        if file.read(len(_NPY_MAGIC)) != _NPY_MAGIC:
            raise ValueError("it does not begin as one")
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    return {"": _Numpy(str(path), _FileRows(path, array) if array.flags.c_contiguous else array)}


def _open_safetensors(path: Path) -> dict[str, DumpArray]:
    from safetensors import safe_open

    with safe_open(str(path), framework="pt") as file:
        keys = list(file.keys())
    return {key: _Safetensors(path, key) for key in keys}


def _open_hdf5(path: Path) -> dict[str, DumpArray]:
    import h5py

    file = h5py.File(path, "r")
    found: dict[str, DumpArray] = {}
    file.visititems(partial(_add_dataset, path, found))
    return found


def _add_dataset(path: Path, found: dict[str, DumpArray], name: str, item: Any) -> None:
    import h5py

    # What lies in other files is not covered by this file's digest.
    is_own = isinstance(item, h5py.Dataset) and not item.is_virtual and not item.external
    if is_own and item.dtype.kind in "fiu" and item.ndim >= _MATRIX_DIMS:
        is_bfloat16 = item.attrs.get("logical_dtype") == "bfloat16" and item.dtype == np.uint16
        found[name] = _Numpy(f"{name!r} of {path}", item, is_bfloat16)


def _torch_dtype(dtype: np.dtype) -> torch.dtype | None:
    known = {np.dtype("f2"): torch.float16, np.dtype("f4"): torch.float32, np.dtype("f8"): torch.float64}
    return known.get(dtype.newbyteorder("="))


class Concatenated:
    """Arrays of several files, one after the other."""

    def __init__(self, parts: list[DumpArray]) -> None:
        """Join arrays of one shape behind the first axis and one dtype; raises ConfigError naming one that differs."""
        self.label = parts[0].label if len(parts) == 1 else f"{parts[0].label} and {len(parts) - 1} more"
        for part in parts[1:]:
            if (part.shape[1:], part.dtype) != (parts[0].shape[1:], parts[0].dtype):
                raise ConfigError(
                    f"{part.label} ({list(part.shape)}, {part.dtype}) does not continue {parts[0].label} "
                    f"({list(parts[0].shape)}, {parts[0].dtype})."
                )
        self._parts = parts
        self._edges = np.concatenate([[0], np.cumsum([part.shape[0] for part in parts])])
        self.shape = (int(self._edges[-1]), *parts[0].shape[1:])
        self.dtype = parts[0].dtype

    def read(self, start: int, stop: int) -> Shaped[Tensor, "row *rest"]:
        """Return rows `start` to `stop` (exclusive) of the whole."""
        pieces = []
        for part, low, high in zip(self._parts, self._edges[:-1], self._edges[1:], strict=True):
            first, last = max(start, int(low)), min(stop, int(high))
            if first < last:
                pieces.append(part.read(first - int(low), last - int(low)))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


class ByPosition:
    """An array (prompt, pos, …) as rows, for dumps of whole batches of prompts."""

    def __init__(self, array: DumpArray) -> None:
        """View an array with at least three axes."""
        self.label = array.label
        self.shape = (array.shape[0] * array.shape[1], *array.shape[2:])
        self.dtype = array.dtype
        self._array = array
        self._n_pos = array.shape[1]

    def read(self, start: int, stop: int) -> Shaped[Tensor, "row *rest"]:
        """Return rows `start` to `stop` (exclusive): prompt after prompt, position after position."""
        first = start // self._n_pos
        block = self._array.read(first, -(-stop // self._n_pos)).flatten(0, 1)
        return block[start - first * self._n_pos : stop - first * self._n_pos]


def as_rows(array: DumpArray, n_rows: int) -> DumpArray:
    """Return the array as `n_rows` rows: as it is, or with its first two axes (prompt, pos) taken together.

    Raises ConfigError if neither fits.
    """
    if array.shape[0] == n_rows:
        return array
    if len(array.shape) > _MATRIX_DIMS and array.shape[0] * array.shape[1] == n_rows:
        return ByPosition(array)
    raise ConfigError(
        f"{array.label} has shape {list(array.shape)} and the token table {n_rows:,} rows: "
        "the array's first axis, or its first two (prompt, pos), have to be the table's rows."
    )
