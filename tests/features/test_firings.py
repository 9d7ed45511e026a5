import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mi_pipe.features import firings as firings_module
from mi_pipe.features.firings import encode_rows, joined, piece_rows
from tests.features.dense_firings import code_of, firings_of, matrices, sparse_matrix


def assert_same(found, expected):
    assert found.first_feature == expected.first_feature
    for name in ("starts", "row", "activation"):
        ours, theirs = getattr(found, name), getattr(expected, name)
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)


@given(matrices)
def test_encoding_in_pieces_finds_every_positive_entry_of_the_dense_matrix(dense):
    rows = np.arange(len(dense)) * 3 + 5
    found = encode_rows(code_of, dense.shape[1], dense, rows)
    expected = firings_of(dense)
    np.testing.assert_array_equal(found.starts, expected.starts)
    np.testing.assert_array_equal(found.row, rows[expected.row])
    np.testing.assert_array_equal(found.activation, expected.activation)


def test_pieces_are_bounded_and_do_not_change_the_result(monkeypatch):
    dense = sparse_matrix(200, 6, 0.3, 0)
    seen = []

    def watching(x):
        seen.append(len(x))
        return code_of(x)

    monkeypatch.setattr(firings_module, "DENSE_ENTRIES", 6 * 32)
    found = encode_rows(watching, 6, dense, np.arange(200))
    assert max(seen) == 32
    assert sum(seen) == 200
    assert_same(found, firings_of(dense))


def test_a_piece_never_exceeds_the_dense_bound():
    for d_sae in (64, 4608, 65_536, 131_072):
        assert piece_rows(d_sae) * d_sae <= firings_module.DENSE_ENTRIES


def test_negative_latents_are_no_firings():
    found = encode_rows(code_of, 2, np.array([[-1.0, 2.0]], np.float32), np.array([4]))
    assert found.counts.tolist() == [0, 1]
    assert found.row.tolist() == [4]


@given(matrices, st.integers(0, 7))
def test_at_returns_the_dense_entry(dense, first_feature):
    found = firings_of(dense, first_feature)
    row, feature = np.indices(dense.shape).reshape(2, -1)
    np.testing.assert_array_equal(found.at(feature + first_feature, row), dense.reshape(-1))


@given(matrices, st.lists(st.integers(0, 60), max_size=4))
def test_joined_row_ranges_equal_the_whole(dense, cuts):
    bounds = [0, *sorted(min(cut, len(dense)) for cut in cuts), len(dense)]
    parts = []
    for start, stop in itertools.pairwise(bounds):
        parts.append(encode_rows(code_of, dense.shape[1], dense[start:stop], np.arange(start, stop)))
    assert_same(joined(parts), firings_of(dense))


def test_the_slice_of_a_feature_counts_from_the_first_feature():
    found = firings_of(np.array([[1, 0, 2], [0, 0, 3]], np.float32), first_feature=10)
    assert found.activation[found.of(12)].tolist() == [2, 3]
    assert found.activation[found.of(11)].tolist() == []
    assert found.feature.tolist() == [10, 12, 12]


@pytest.mark.parametrize("d_sae", [70_000])
def test_wide_dictionaries_are_sorted_by_feature(d_sae):
    dense = torch.zeros(5, d_sae)
    dense[[0, 1, 2, 4], [69_999, 3, 66_000, 3]] = torch.tensor([1.0, 2.0, 3.0, 4.0])
    found = encode_rows(code_of, d_sae, dense.numpy(), np.arange(5))
    assert found.feature.tolist() == [3, 3, 66_000, 69_999]
    assert found.row.tolist() == [1, 4, 2, 0]
