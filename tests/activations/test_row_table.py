"""The token table is made in blocks and is the same table for any size of a block."""

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mi_pipe.activations import row_table as module
from mi_pipe.activations.row_table import row_table, write_row_table
from mi_pipe.activations.tokens import Tokens


def tokens_of(lengths, share, seed=0):
    rng = np.random.default_rng(seed)
    n_tokens = sum(lengths)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return Tokens(rng.integers(0, 50, n_tokens).astype(np.int32), offsets, rng.random(n_tokens) < share)


@given(st.lists(st.integers(0, 12), min_size=1, max_size=30), st.floats(0, 1), st.data())
@settings(max_examples=100, deadline=None)
def test_labels_of_any_rows_are_those_of_the_whole(lengths, share, data):
    tokens = tokens_of(lengths, share)
    start = data.draw(st.integers(0, tokens.n_rows))
    stop = data.draw(st.integers(start, tokens.n_rows))
    places = tokens.places(start, stop) if stop > start else np.empty(0, np.int64)
    np.testing.assert_array_equal(places, np.flatnonzero(tokens.kept)[start:stop])
    for name, values in tokens.labels(places).items():
        np.testing.assert_array_equal(values, tokens.row_arrays()[name][start:stop])
        assert values.dtype == np.int32


@pytest.mark.parametrize("block_rows", [7, 64, 1 << 17])
def test_blocks_make_one_table_with_a_row_group_each(tmp_path, monkeypatch, block_rows):
    monkeypatch.setattr(module, "_BLOCK_ROWS", block_rows)
    tokens = tokens_of([9, 0, 4, 30, 1, 12] * 5, 0.8)
    texts = pd.Series([f" w{i}" for i in tokens.ids])
    massive = {"blocks.0.hook_resid_post": np.arange(tokens.n_rows) % 5 == 0}
    write_row_table(tmp_path / "t.parquet", row_table(tokens, texts, massive))
    frame = pd.read_parquet(tmp_path / "t.parquet")
    assert list(frame) == ["row", "prompt_idx", "pos", "token_id", "text", "massive:blocks.0.hook_resid_post"]
    np.testing.assert_array_equal(frame["row"], np.arange(tokens.n_rows))
    for name, values in tokens.row_arrays().items():
        np.testing.assert_array_equal(frame[name], values)
    assert frame["text"].dtype == "category"
    assert list(frame["text"]) == [f" w{i}" for i in tokens.ids[tokens.kept]]
    np.testing.assert_array_equal(frame["massive:blocks.0.hook_resid_post"], massive["blocks.0.hook_resid_post"])
    file = pq.ParquetFile(tmp_path / "t.parquet")
    assert file.num_row_groups == -(-tokens.n_rows // block_rows)
