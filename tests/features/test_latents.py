import numpy as np
import pandas as pd
import pytest

from mi_pipe.features import latents
from mi_pipe.features.firings import encode_rows
from mi_pipe.features.latents import block_ranges, feature_counts, feature_ranges, read_latents, write_latents
from tests.features.dense_firings import code_of, firings_of, sparse_matrix


@pytest.fixture
def blocks(tmp_path, monkeypatch):
    """A matrix of 500 rows and 20 features, in blocks of 128 rows and row groups of 50 firings."""
    monkeypatch.setattr(latents, "BLOCK_ROWS", 128)
    monkeypatch.setattr(latents, "_ROW_GROUP", 50)
    dense = sparse_matrix(500, 20, 0.15, 0)
    dense[:, 7] = 0
    paths = []
    for block, (start, stop) in enumerate(block_ranges(len(dense))):
        paths.append(tmp_path / latents.block_name(block))
        write_latents(paths[-1], encode_rows(code_of, 20, dense[start:stop], np.arange(start, stop)))
    return dense, paths


def test_every_range_of_features_reads_back_as_it_was_encoded(blocks):
    dense, paths = blocks
    for first, last in [(0, 20), (0, 1), (7, 8), (3, 11), (19, 20)]:
        found, expected = read_latents(paths, first, last), firings_of(dense[:, first:last], first)
        assert found.first_feature == first
        np.testing.assert_array_equal(found.starts, expected.starts)
        np.testing.assert_array_equal(found.row, expected.row)
        np.testing.assert_array_equal(found.activation, expected.activation)


def test_counts_over_blocks_are_those_of_the_matrix(blocks):
    dense, paths = blocks
    np.testing.assert_array_equal(feature_counts(paths, 20), (dense > 0).sum(0))


def test_pandas_reads_one_feature_without_mi_pipe(blocks):
    dense, paths = blocks
    frame = pd.read_parquet(paths[0].parent, filters=[("feature", "==", 5)]).sort_values("row")
    assert frame["row"].tolist() == np.flatnonzero(dense[:, 5]).tolist()


def test_the_same_firings_give_the_same_bytes(tmp_path):
    firings = firings_of(sparse_matrix(100, 5, 0.2, 1))
    write_latents(tmp_path / "a.parquet", firings)
    write_latents(tmp_path / "b.parquet", firings)
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()


def test_ranges_cover_all_features_once_within_the_bounds(monkeypatch):
    monkeypatch.setattr(latents, "MAX_FIRINGS", 10)
    monkeypatch.setattr(latents, "MAX_FEATURES", 4)
    counts = np.array([3, 7, 1, 0, 0, 0, 0, 0, 25, 2, 10, 1])
    ranges = list(feature_ranges(counts))
    assert [feature for first, last in ranges for feature in range(first, last)] == list(range(12))
    for first, last in ranges:
        assert last - first <= 4
        assert counts[first:last].sum() <= 10 or last - first == 1
