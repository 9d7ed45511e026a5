import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mi_pipe.features.histograms import histogram_edges, histograms_of
from tests.features.dense_firings import firings_of, matrices


@given(matrices, st.integers(1, 13))
def test_counts_are_those_of_numpy_with_the_same_edges(dense, n_bins):
    counts, edges = histograms_of(firings_of(dense), n_bins)
    for feature, column in enumerate(dense.T):
        firing = column[column > 0]
        assert counts[feature].sum() == len(firing)
        if len(firing):
            np.testing.assert_array_equal(counts[feature], np.histogram(firing, edges[feature])[0])


def test_an_activation_on_an_edge_is_in_the_bin_above_and_the_largest_in_the_last():
    counts, edges = histograms_of(firings_of(np.array([[1], [2], [3], [4], [0]], np.float32)), 4)
    assert edges.tolist() == [[0, 1, 2, 3, 4]]
    assert counts.tolist() == [[0, 1, 1, 2]]


def test_values_that_are_edges_in_float32_are_never_one_bin_off():
    largest = np.float32(0.7)
    edges = histogram_edges(np.array([largest]), 40)[0]
    counts, _ = histograms_of(firings_of(edges[1:, None]), 40)
    np.testing.assert_array_equal(counts[0], np.histogram(edges[1:], edges)[0])


def test_a_feature_that_never_fires_has_zeros():
    counts, edges = histograms_of(firings_of(np.zeros((3, 1), np.float32)), 5)
    assert not counts.any()
    assert not edges.any()
