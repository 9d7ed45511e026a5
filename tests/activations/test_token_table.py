"""The token table read by row group: equal to pandas on the whole table, whatever the row groups are."""

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from mi_pipe.activations.token_table import TokenTable

N_ROWS = 100


@pytest.fixture(scope="module")
def frames():
    rng = np.random.default_rng(0)
    tokens = pd.DataFrame(
        {
            "row": np.arange(N_ROWS),
            "prompt_idx": np.repeat(np.arange(10, dtype=np.int32), 10),
            "pos": np.tile(np.arange(10, dtype=np.int32), 10),
            "token_id": rng.integers(0, 5, N_ROWS).astype(np.int32),
            "massive:h.0": rng.random(N_ROWS) < 0.2,
        }
    )
    tokens.insert(4, "text", pd.Categorical([f" t{i}" for i in tokens["token_id"]]))
    prompts = pd.DataFrame(
        {
            "prompt_idx": np.arange(10, dtype=np.int32),
            "n_tokens": np.full(10, 10, np.int32),
            "role": ["clean", "corrupted"] * 5,
            "pos_subject": pd.array([None, 3] * 5, "Int32"),
            "is_new": pd.array([True, None] * 5, "boolean"),
            "words": [["a"], []] * 5,
        }
    )
    return tokens, prompts


@pytest.fixture(scope="module", params=[7, 100])
def table(request, frames, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tables")
    tokens, prompts = frames
    tokens.to_parquet(folder / "tokens.parquet", row_group_size=request.param)
    prompts.to_parquet(folder / "prompts.parquet")
    return TokenTable(folder / "tokens.parquet", folder / "prompts.parquet")


def rows(table, condition, **aliases):
    return table.rows(table.condition(condition, aliases)).tolist()


def test_conditions_pick_the_rows_that_pandas_picks(table, frames):
    tokens, prompts = frames
    joined = tokens.merge(prompts[["prompt_idx", "role", "pos_subject"]]).assign(token=tokens["text"].astype(str))
    for condition in ("token == ' t3' and pos > 4", "row >= 6 and row < 9", "`massive:h.0` and role == 'clean'"):
        expected = joined.query(condition, engine="python")["row"].tolist()
        assert rows(table, condition) == expected
        assert expected, condition
    assert rows(table, "pos == pos_subject") == joined[joined["pos"] == joined["pos_subject"].fillna(-1)].index.tolist()
    assert rows(table, "is_new") == joined[joined["prompt_idx"] % 2 == 0].index.tolist()
    assert rows(table, "pos == 77") == []
    assert rows(table, "True") == list(range(N_ROWS))
    assert rows(table, "massive", massive="massive:h.0") == np.flatnonzero(tokens["massive:h.0"]).tolist()


def test_lines_are_those_of_the_whole_table(table, frames):
    tokens, _ = frames
    for picked in ([], [0], [6, 7, 8, 50, 99], range(N_ROWS)):
        found = table.take(np.array(picked, np.int64))
        expected = tokens.iloc[list(picked)].reset_index(drop=True)
        pd.testing.assert_frame_equal(found.astype({"text": object}), expected.astype({"text": object}))
        assert list(table.take(np.array(picked, np.int64), ["pos", "row"])) == ["pos", "row"]


def test_only_row_groups_and_columns_asked_for_are_read(table, monkeypatch):
    read = []
    original = pq.ParquetFile.read_row_group

    def spied(self, group, columns=None, **kwargs):
        read.append((group, tuple(columns)))
        return original(self, group, columns=columns, **kwargs)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", spied)
    n_groups = pq.ParquetFile(table._tokens).num_row_groups
    rows(table, "pos > 3 and token == ' t1'")
    assert read == [(group, ("pos", "text")) for group in range(n_groups)]
    read.clear()
    rows(table, "role == 'clean'")
    assert read == [(group, ("prompt_idx",)) for group in range(n_groups)]
    read.clear()
    table.take(np.array([50, 51]), ["pos"])
    assert read == [(50 // 7 if n_groups > 1 else 0, ("pos",))]


def test_columns_that_cannot_be_compared_are_unknown(table):
    assert table.prompt_columns == ["n_tokens", "role", "pos_subject", "is_new"]
