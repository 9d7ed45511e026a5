"""Labels of a store's rows: classes or numbers, from a column, a condition, a function or a table."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Int, Shaped

from mi_pipe.activations.store import ActivationStore
from mi_pipe.activations.where import Texts
from mi_pipe.core.errors import ConfigError, near_names
from mi_pipe.probes.config import LabelConfig
from mi_pipe.probes.user_labels import function_values, table_values

MISSING = -1
_MOST_NUMBERS = 20
"""More distinct whole numbers than these are regressed."""


@dataclass(frozen=True)
class Labels:
    """One label for each row of a store."""

    values: Shaped[np.ndarray, " row"]
    """Class numbers (int64, MISSING where there is none), or float64 with NaN."""
    classes: tuple[str, ...] = ()
    """Names of the classes, sorted; none for regression."""

    @property
    def is_classes(self) -> bool:
        """Say whether these are classes."""
        return bool(self.classes)

    @property
    def is_known(self) -> Shaped[np.ndarray, " row"]:
        """Which rows have a label."""
        return self.values != MISSING if self.is_classes else np.isfinite(self.values)


def check_label(store: ActivationStore, name: str, spec: LabelConfig) -> None:
    """Raise ConfigError for a column or condition that the store's tables do not have."""
    if spec.column is not None and spec.column not in column_names(store):
        known = column_names(store)
        near = near_names(spec.column, known) or f" Columns are {', '.join(known)}."
        raise ConfigError(f"probes.labels.{name}: {store.id} has no column {spec.column!r}.{near}")
    if spec.where is not None:
        store.condition(spec.where)


def labels_of(store: ActivationStore, name: str, spec: LabelConfig) -> Labels:
    """Return the labels of all rows; raises ConfigError if there is nothing to tell apart."""
    check_label(store, name, spec)
    if spec.column is not None:
        values = column_values(store, spec.column)
    elif spec.where is not None:
        values = np.zeros(store.n_rows, bool)
        values[store.rows(spec.where)] = True
    else:
        rows = rows_table(store)
        values = function_values(spec.function, rows) if spec.function else table_values(_table(spec), rows)
    if pd.isna(values).all():
        raise ConfigError(f"probes.labels.{name} is missing at every row of {store.id}.")
    found = _as_numbers(name, values) if _is_regression(values, spec.kind) else _as_classes(name, values)
    if found.is_classes and len(found.classes) < 2:  # noqa: PLR2004
        raise ConfigError(
            f"probes.labels.{name} has one class alone ({', '.join(found.classes)}): there is nothing to read."
        )
    return found


def _table(spec: LabelConfig) -> Path:
    assert spec.table is not None, "the config has refused it"
    return spec.table


def column_names(store: ActivationStore) -> list[str]:
    """Return the columns of tokens and prompts that can be labels."""
    return [*store.token_table.columns, *store.token_table.prompt_columns]


def column_values(store: ActivationStore, name: str) -> Shaped[np.ndarray, " row"]:
    """Return a column of the token or prompt table at every row; raises ConfigError if there is none."""
    if name not in column_names(store):
        raise ConfigError(f"{store.id} has no column {name!r}.{near_names(name, column_names(store))}")
    parts = [block.columns[name] for block in store.token_table.blocks([name])]
    return np.concatenate([part.decoded() if isinstance(part, Texts) else part for part in parts])


def rows_table(store: ActivationStore) -> pd.DataFrame:
    """Return what is known of every row's token and prompt, for functions and tables of labels."""
    return pd.DataFrame({name: column_values(store, name) for name in column_names(store)})


def _is_regression(values: Shaped[np.ndarray, " row"], kind: str) -> bool:
    if kind != "auto":
        return kind == "regression"
    if values.dtype.kind == "f":
        # A column of whole numbers with gaps is read as floats.
        finite = values[np.isfinite(values)]
        return bool((finite != np.round(finite)).any()) or len(np.unique(finite)) > _MOST_NUMBERS
    return values.dtype.kind in "iu" and len(np.unique(values)) > _MOST_NUMBERS


def _as_numbers(name: str, values: Shaped[np.ndarray, " row"]) -> Labels:
    try:
        numbers: Any = pd.Series(values).astype("Float64")
        return Labels(numbers.to_numpy(np.float64, na_value=np.nan))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"probes.labels.{name}: labels to be regressed have to be numbers ({error}).") from error


def _as_classes(name: str, values: Shaped[np.ndarray, " row"]) -> Labels:
    known = ~pd.isna(values)
    try:
        distinct, codes = np.unique(values[known], return_inverse=True)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"probes.labels.{name}: classes have to be texts, numbers, or yes and no, of one kind ({error})."
        ) from error
    numbers: Int[np.ndarray, " row"] = np.full(len(values), MISSING, np.int64)
    numbers[known] = codes
    return Labels(numbers, tuple(_name(value) for value in distinct.tolist()))


def _name(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
