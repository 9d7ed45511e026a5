"""Reads `tokens.parquet` of an activation store a row group at a time, and only the columns that are asked for.

What is known of prompts (`prompts.parquet`, one line a prompt) can be named in conditions like what is known of
tokens; such a column has at each row the value of the row's prompt. Memory depends on the size of a row group
(about a million rows), the prompts and the rows that are returned, not on the number of tokens.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Int, Shaped

from mi_pipe.activations.where import Column, Condition, Texts

TEXT = "text"
TOKEN_ALIAS = {"token": TEXT}
_PROMPT = "prompt_idx"


@dataclass(frozen=True)
class TableBlock:
    """The lines of one row group: rows `start` to `start + n_rows` of the store."""

    start: int
    n_rows: int
    columns: dict[str, Column]


class TokenTable:
    """The token table of a store, with the columns of its prompt table."""

    def __init__(self, tokens: Path, prompts: Path) -> None:
        """Read the files at these paths, when asked for something."""
        self._tokens = tokens
        self._prompts_path = prompts

    @cached_property
    def columns(self) -> list[str]:
        """The columns of the token table."""
        return list(pq.read_schema(self._tokens).names)

    @cached_property
    def prompt_columns(self) -> list[str]:
        """The columns of the prompt table that the token table has not: numbers, flags and strings."""
        fields = pq.read_schema(self._prompts_path)
        return [field.name for field in fields if field.name not in self.columns and _is_plain(field.type)]

    def condition(self, text: str, aliases: dict[str, str] | None = None) -> Condition:
        """Parse a condition on these columns, in which `token` stands for `text`; raises ConfigError."""
        return Condition(text, [*self.columns, *self.prompt_columns], {**TOKEN_ALIAS, **(aliases or {})})

    def blocks(self, columns: Sequence[str]) -> Iterator[TableBlock]:
        """Yield the table's row groups in order, with just these columns."""
        of_prompts = [name for name in columns if name not in self.columns]
        names = [name for name in columns if name in self.columns]
        if of_prompts and _PROMPT not in names:
            names.append(_PROMPT)
        with pq.ParquetFile(self._tokens) as file:
            start = 0
            for group in range(file.num_row_groups):
                n_rows = file.metadata.row_group(group).num_rows
                read: dict[str, Column] = {}
                if names:
                    table = file.read_row_group(group, columns=names)
                    read = {name: _column(table.column(name)) for name in names}
                for name in of_prompts:
                    prompt_idx = read[_PROMPT]
                    assert isinstance(prompt_idx, np.ndarray), "prompt numbers are numbers"
                    read[name] = _at(self._of_prompts(name), prompt_idx)
                yield TableBlock(start, n_rows, read)
                start += n_rows

    def rows(self, condition: Condition) -> Int[np.ndarray, " row"]:
        """Return the rows that fulfil a condition, ascending, int64."""
        found = [
            block.start + np.flatnonzero(condition.mask(block.columns, block.n_rows))
            for block in self.blocks(condition.columns)
        ]
        return np.concatenate([np.empty(0, np.int64), *found])

    def take(self, rows: Int[np.ndarray, " row"], columns: Sequence[str] | None = None) -> pd.DataFrame:
        """Return the lines of ascending rows, with all columns of the token table or some of them."""
        names = self.columns if columns is None else list(columns)
        with pq.ParquetFile(self._tokens) as file:
            pieces = [file.schema_arrow.empty_table().select(names)]
            start = 0
            for group in range(file.num_row_groups):
                stop = start + file.metadata.row_group(group).num_rows
                first, last = np.searchsorted(rows, [start, stop])
                if last > first:
                    pieces.append(
                        file.read_row_group(group, columns=names).select(names).take(rows[first:last] - start)
                    )
                start = stop
        return pa.concat_tables(pieces).unify_dictionaries().to_pandas()

    def _of_prompts(self, name: str) -> Column:
        if name not in self._prompt_values:
            table = pq.read_table(self._prompts_path, columns=[name])
            self._prompt_values[name] = _column(table.column(name))
        return self._prompt_values[name]

    @cached_property
    def _prompt_values(self) -> dict[str, Column]:
        return {}


def _column(values: pa.ChunkedArray) -> Column:
    """Return a column as numbers, flags or references to strings; missing numbers are NaN."""
    if pa.types.is_boolean(values.type):
        return values.fill_null(False).to_numpy()
    if not _is_text(values.type):
        found = values.to_numpy()
        return found.astype(np.int64) if found.dtype.kind in "iu" else found
    encoded: Any = values if pa.types.is_dictionary(values.type) else values.dictionary_encode()
    array = encoded.unify_dictionaries().combine_chunks()
    codes = array.indices.fill_null(-1).to_numpy(zero_copy_only=False)
    return Texts(codes.astype(np.int64), array.dictionary.to_pylist())


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_dictionary(kind)


def _is_plain(kind: pa.DataType) -> bool:
    """Say whether a condition can compare values of this type."""
    is_number = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)
    return is_number or _is_text(kind)


def _at(values: Column, prompts: Shaped[np.ndarray, " row"]) -> Column:
    if isinstance(values, Texts):
        return Texts(values.codes[prompts], values.values)
    return values[prompts]
