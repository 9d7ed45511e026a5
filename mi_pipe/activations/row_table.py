"""`tokens.parquet` of an activation store: one line a row, with the text of its token and which rows are massive.

It is made and written in blocks, one row group each, so that memory does not grow with the number of rows.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Bool

from mi_pipe.activations.tokens import Tokens
from mi_pipe.core.atomic import atomic_path

TOKENS_FILE = "tokens.parquet"
MASSIVE_PREFIX = "massive:"
_BLOCK_ROWS = 1 << 17
_ORDER = ("row", "prompt_idx", "pos", "token_id", "text")
# Numbers that count up are stored as differences: a dictionary of them would be large and of no use.
_ENCODINGS: dict[str, Any] = {
    "use_dictionary": ["token_id", "text"],
    "column_encoding": dict.fromkeys(("row", "prompt_idx", "pos"), "DELTA_BINARY_PACKED"),
}


def row_table(tokens: Tokens, texts: pd.Series, massive: dict[str, Bool[np.ndarray, " row"]]) -> Iterator[pd.DataFrame]:
    """Yield the table in blocks; `texts` has one entry a token of the prompts, kept or not."""
    texts = texts.astype("category")
    for start in range(0, tokens.n_rows, _BLOCK_ROWS):
        stop = min(start + _BLOCK_ROWS, tokens.n_rows)
        places = tokens.places(start, stop)
        columns = {
            "row": np.arange(start, stop, dtype=np.int64),
            **tokens.labels(places),
            "text": texts.iloc[places].array,
        }
        flags = {MASSIVE_PREFIX + hook: found[start:stop] for hook, found in massive.items()}
        yield pd.DataFrame({**{name: columns[name] for name in _ORDER}, **flags})


def write_row_table(path: Path, blocks: Iterable[pd.DataFrame]) -> None:
    """Write blocks of a table with the same columns as one Parquet file (zstd), whole or not at all."""
    with atomic_path(path) as temp:
        writer: pq.ParquetWriter | None = None
        for block in blocks:
            table = pa.Table.from_pandas(block, preserve_index=False)
            writer = writer or pq.ParquetWriter(temp, table.schema, compression="zstd", **_ENCODINGS)
            writer.write_table(table)
        assert writer is not None, "a store has rows"
        writer.close()
