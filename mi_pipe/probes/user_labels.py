"""Labels of a user's own: a function by import path, or a Parquet table."""

import inspect
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
from jaxtyping import Shaped
from pandas.api.types import is_integer_dtype

from mi_pipe.core.canonical import content_hash
from mi_pipe.core.errors import ConfigError

LABEL = "label"
_KEYS = (("row",), ("prompt_idx", "pos"), ("prompt_idx",))


def load_function(path: str) -> Callable[[pd.DataFrame], Any]:
    """Return the function at `module:callable`; raises ConfigError if there is none."""
    module, colon, name = path.partition(":")
    if not (module and colon and name):
        raise ConfigError(f"A label's function is written module:callable, got {path!r}.")
    try:
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"The label's function {path!r} cannot be imported: {error}.") from error
    if not callable(found):
        raise ConfigError(
            f"The label's function {path!r} is {type(found).__name__}, not a function of the rows' table."
        )
    return found


def source_hash(path: str) -> str:
    """Return a hash of the function's source: another function of the same name gives another result."""
    try:
        return content_hash(inspect.getsource(load_function(path)))
    except (OSError, TypeError):
        return content_hash(path)


def function_values(path: str, rows: pd.DataFrame) -> Shaped[np.ndarray, " row"]:
    """Return what the function says of each row; raises ConfigError if it fails, or not one value a row comes back."""
    function = load_function(path)
    try:
        values = np.asarray(function(rows))
    except Exception as error:
        # Whatever the user's own code raises.
        raise ConfigError(f"The label's function {path!r} failed: {type(error).__name__}: {error}.") from error
    if values.shape != (len(rows),):
        raise ConfigError(f"The label's function {path!r} gave shape {values.shape} for {len(rows)} rows.")
    return values


def check_table(path: Path) -> tuple[str, ...]:
    """Return the keys of a table of labels; raises ConfigError if it has no labels or no keys."""
    try:
        names = pq.read_schema(path).names
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} is no Parquet table of labels: {error}.") from error
    keys = next((keys for keys in _KEYS if set(keys) <= set(names)), None)
    if LABEL not in names or keys is None:
        raise ConfigError(
            f"{path} has the columns {', '.join(names)}; a table of labels has {LABEL!r} and row, or prompt_idx and "
            "pos, or prompt_idx."
        )
    return keys


def table_values(path: Path, rows: pd.DataFrame) -> Shaped[np.ndarray, " row"]:
    """Return the label of each row, missing where the table has none; raises ConfigError for a key that comes twice.

    Keys are whole numbers.
    """
    keys = list(check_table(path))
    table = pd.read_parquet(path, columns=[*keys, LABEL])
    if not all(is_integer_dtype(table[key]) for key in keys):
        raise ConfigError(f"{path}: {' and '.join(keys)} have to be whole numbers, none missing.")
    if table.duplicated(keys).any():
        raise ConfigError(f"{path} has two labels for one {' and '.join(keys)}.")
    return rows[keys].merge(table, on=keys, how="left")[LABEL].to_numpy()
