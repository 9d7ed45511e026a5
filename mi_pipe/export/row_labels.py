"""Which token each row of a dump is: a table with prompt_idx, pos, token_id and, if known, text.

Row i of the table is row i of the arrays. Rows are in prompt order: prompt_idx counts from 0 without gaps, pos rises
within a prompt (tokens may be left out, such as BOS). Read from Parquet, CSV, or the group or compound data set
`tokens` of an HDF5 file; other columns are ignored.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Int

from mi_pipe.activations.row_table import MASSIVE_PREFIX
from mi_pipe.core.errors import ConfigError
from mi_pipe.export.hdf5 import TOKENS
from mi_pipe.export.hdf5_table import has_table, read_table

_NUMBERS = ("prompt_idx", "pos", "token_id")
_TEXT = "text"
_NO_TOKEN = -1
"""What a capture of items that are no tokens has for token_id."""
_LARGEST = np.iinfo(np.int32).max
_HDF5 = (".h5", ".hdf5")


@dataclass(frozen=True)
class RowLabels:
    """The rows of a store: their tokens, and what is known of their prompts."""

    prompt_idx: Int[np.ndarray, " row"]
    pos: Int[np.ndarray, " row"]
    token_id: Int[np.ndarray, " row"]
    text: pd.Series
    """Categories."""
    prompts: pd.DataFrame

    @property
    def n_rows(self) -> int:
        """Number of rows."""
        return len(self.pos)

    @property
    def n_prompts(self) -> int:
        """Number of prompts."""
        return len(self.prompts)

    @cached_property
    def row_arrays(self) -> dict[str, Int[np.ndarray, " row"]]:
        """prompt_idx, pos and token_id of every row, int32."""
        return {name: getattr(self, name) for name in _NUMBERS}

    @cached_property
    def prompt_offset(self) -> Int[np.ndarray, " prompt_edge"]:
        """Where each prompt's rows begin, and where the last prompt's end."""
        return np.searchsorted(self.prompt_idx, np.arange(self.n_prompts + 1)).astype(np.int64)

    def table(self, massive: dict[str, Any]) -> pd.DataFrame:
        """Return `tokens.parquet` with the given flags by hook point."""
        columns: dict[str, Any] = {"row": np.arange(self.n_rows, dtype=np.int64), **self.row_arrays, _TEXT: self.text}
        return pd.DataFrame({**columns, **{MASSIVE_PREFIX + hook: flags for hook, flags in massive.items()}})


def read_labels(path: Path, prompts: pd.DataFrame | None = None) -> RowLabels:
    """Read a token table; `prompts` is what is known of the prompts, else it is made from the rows.

    Raises ConfigError naming the column or the first row that is not as it has to be.
    """
    frame = _read(path)
    numbers = {name: _numbers(frame, name, path, prompts is not None) for name in _NUMBERS}
    _check_order(numbers["prompt_idx"], numbers["pos"], path, None if prompts is None else len(prompts))
    if "row" in frame and not np.array_equal(frame["row"], np.arange(len(frame))):
        raise ConfigError(f"The column row of {path} does not count 0, 1, 2, …; sort the table as the arrays are.")
    return RowLabels(
        **numbers, text=_texts(frame, numbers["token_id"]), prompts=_prompts(numbers) if prompts is None else prompts
    )


def _texts(frame: pd.DataFrame, token_id: Int[np.ndarray, " row"]) -> pd.Series:
    """Return the tokens' texts, or their numbers where no texts are known."""
    text = pd.Series(frame.get(_TEXT, token_id))
    return text if isinstance(text.dtype, pd.CategoricalDtype) else text.astype(str).astype("category")


def _read(path: Path) -> pd.DataFrame:
    if not path.is_file():
        raise ConfigError(f"There is no token table {path}.")
    readers = {".parquet": pd.read_parquet, ".csv": _read_csv, **dict.fromkeys(_HDF5, _read_hdf5)}
    if path.suffix not in readers:
        raise ConfigError(f"{path} is none of {', '.join(readers)} by its name.")
    try:
        return readers[path.suffix](path).reset_index(drop=True)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"The token table {path} cannot be read ({error}).") from error


def _read_csv(path: Path) -> pd.DataFrame:
    """Read text as it is: tokens such as "NA" and "null" are tokens."""
    return pd.read_csv(path, dtype={_TEXT: str}, keep_default_na=False, na_filter=False)


def _read_hdf5(path: Path) -> pd.DataFrame:
    import h5py

    with h5py.File(path, "r") as file:
        item = file.get(TOKENS)
        if isinstance(item, h5py.Group) and has_table(item):
            return read_table(item).to_pandas()
        if isinstance(item, h5py.Group):
            columns = {name: _column(column) for name, column in item.items() if isinstance(column, h5py.Dataset)}
        elif isinstance(item, h5py.Dataset) and item.dtype.names:
            columns = {name: _decoded(item[:][name]) for name in item.dtype.names}
        else:
            raise ConfigError(f"{path} has no token table: no group or compound data set {TOKENS!r}. Give --tokens.")
    return pd.DataFrame({name: columns[name] for name in (*_NUMBERS, _TEXT, "row") if name in columns})


def _column(column: Any) -> Any:
    import h5py

    return column.asstr()[:] if h5py.check_string_dtype(column.dtype) else column[:]


def _decoded(values: Any) -> Any:
    if values.dtype.kind in "SO":
        return [value.decode() if isinstance(value, bytes) else value for value in values.tolist()]
    return values


def _numbers(frame: pd.DataFrame, name: str, path: Path, is_ours: bool) -> Int[np.ndarray, " row"]:
    if name not in frame:
        raise ConfigError(f"The token table {path} has no column {name!r}; it has {', '.join(map(str, frame))}.")
    values = pd.Series(frame[name])
    if not pd.api.types.is_integer_dtype(values) or bool(values.isna().any()):
        raise ConfigError(f"The column {name} of {path} has to hold whole numbers at every row.")
    lowest = _NO_TOKEN if is_ours and name == "token_id" else 0
    wrong = np.flatnonzero((values < lowest) | (values > _LARGEST))
    if len(wrong):
        raise ConfigError(f"The column {name} of {path} is {values.iloc[wrong[0]]} at row {wrong[0]:,}.")
    return values.to_numpy(np.int32)


def _check_order(
    prompt_idx: Int[np.ndarray, " row"], pos: Int[np.ndarray, " row"], path: Path, n_prompts: int | None
) -> None:
    """Raise ConfigError at the first row that is out of order; empty prompts are allowed if their number is known."""
    if len(pos) == 0:
        raise ConfigError(f"The token table {path} has no rows.")
    step = np.diff(prompt_idx.astype(np.int64), prepend=-1 if n_prompts is None else 0)
    largest = 1 if n_prompts is None else n_prompts
    wrong = np.flatnonzero((step < 0) | (step > largest))
    if len(wrong) or (n_prompts is not None and prompt_idx[-1] >= n_prompts):
        row = int(wrong[0]) if len(wrong) else len(pos) - 1
        before = f" after prompt {prompt_idx[row - 1]}" if row else ""
        raise ConfigError(
            f"Row {row:,} of {path} is of prompt {prompt_idx[row]}{before}: "
            "number prompts from 0 without gaps, and sort the table and the arrays by prompt_idx and pos."
        )
    wrong = np.flatnonzero((np.diff(pos.astype(np.int64)) <= 0) & (np.diff(prompt_idx) == 0))
    if len(wrong):
        row = int(wrong[0]) + 1
        raise ConfigError(
            f"Row {row:,} of {path} is position {pos[row]} of prompt {prompt_idx[row]} after position {pos[row - 1]}: "
            "sort the table and the arrays by prompt_idx and pos."
        )


def _prompts(numbers: dict[str, Int[np.ndarray, " row"]]) -> pd.DataFrame:
    """Return a line a prompt; the number of tokens is the last position's and one more."""
    last = np.append(np.flatnonzero(np.diff(numbers["prompt_idx"])), len(numbers["pos"]) - 1)
    n_tokens = numbers["pos"][last] + np.int32(1)
    return pd.DataFrame({"prompt_idx": np.arange(len(last), dtype=np.int32), "n_tokens": n_tokens, "source": "import"})
