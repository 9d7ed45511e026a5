import numpy as np
import pytest
from hypothesis import given

from mi_pipe.features.density import density_of
from tests.features.dense_firings import firings_of, matrices


def test_five_rows_worked_by_hand():
    dense = np.array([[1, 0, 0], [3, 0, 0], [0, 0, 0.5], [2, 0, 0], [0, 0, 0]], np.float32)
    found = density_of(firings_of(dense), n_rows=5)
    assert found.n_firings.tolist() == [3, 0, 1]
    assert found.density.tolist() == [0.6, 0.0, 0.2]
    assert found.mean_activation[[0, 2]].tolist() == [2.0, 0.5]
    assert np.isnan(found.mean_activation[1])
    assert found.max_activation.tolist() == [3.0, 0.0, 0.5]


@given(matrices)
def test_equals_a_loop_over_the_dense_matrix(dense):
    found = density_of(firings_of(dense), len(dense))
    for feature, column in enumerate(dense.T):
        firing = column[column > 0].astype(np.float64)
        assert found.n_firings[feature] == len(firing)
        assert found.max_activation[feature] == max(firing, default=0)
        if len(firing):
            assert found.density[feature] == len(firing) / len(dense)
            assert found.mean_activation[feature] == pytest.approx(sum(firing) / len(firing), rel=1e-12)
