from itertools import product
from math import erfc, sqrt

import numpy as np
import pytest

from mi_pipe.patching.statistics import (
    Resampling,
    bootstrap_interval,
    bootstrap_weights,
    sign_flip_p,
    weighted_means,
)


def test_p_of_few_pairs_is_the_share_of_all_sign_patterns():
    values = np.array([0.9, 1.1, -0.2, 0.4, 0.5])
    as_far = [abs(np.dot(signs, values)) >= abs(values.sum()) - 1e-12 for signs in product((1, -1), repeat=5)]
    assert float(sign_flip_p(values)) == pytest.approx(np.mean(as_far))
    assert float(sign_flip_p(np.ones(5))) == pytest.approx(2 / 32), "only all plus and all minus are as far"


def test_p_of_many_pairs_is_near_the_normal_approximation_and_never_zero():
    rng = np.random.default_rng(3)
    values = rng.normal(0.25, 1.0, 60)

    z = values.sum() / np.sqrt(np.square(values).sum())
    assert float(sign_flip_p(values)) == pytest.approx(erfc(abs(z) / sqrt(2)), abs=0.02)
    assert float(sign_flip_p(np.ones(60))) == pytest.approx(1 / 4097)


def test_p_is_uniform_where_nothing_has_an_effect():
    p = sign_flip_p(np.random.default_rng(0).normal(size=(20, 2000)))
    assert abs((p < 0.05).mean() - 0.05) < 0.02
    assert abs(p.mean() - 0.5) < 0.03


def test_the_interval_is_that_of_a_plain_loop_over_the_same_draws():
    rng = np.random.default_rng(1)
    values, how = rng.exponential(size=15), Resampling(n_resamples=300, level=0.9)
    weights = bootstrap_weights(15, how)
    assert (weights.sum(1) == 15).all()
    means = [np.repeat(values, row.astype(int)).mean() for row in weights]
    low, high = bootstrap_interval(values, how)
    assert (float(low), float(high)) == pytest.approx(tuple(np.quantile(means, [0.05, 0.95])))


def test_95_percent_of_intervals_hold_the_true_mean():
    values = np.random.default_rng(2).normal(1.0, 2.0, (50, 1000))
    low, high = bootstrap_interval(values)
    assert 0.91 < ((low <= 1.0) & (high >= 1.0)).mean() < 0.97


def test_pairs_without_a_cell_do_not_count():
    values = np.array([[1.0, np.nan], [3.0, np.nan], [np.nan, np.nan]])
    means = weighted_means(np.array([[1.0, 1.0, 1.0], [0.0, 0.0, 3.0]]), values)
    assert means[0, 0] == 2.0
    assert np.isnan(means[[0, 1, 1], [1, 0, 1]]).all()
    low, high = bootstrap_interval(values)
    assert 1.0 <= low[0] <= high[0] <= 3.0
    assert np.isnan([low[1], high[1], sign_flip_p(values)[1]]).all()
    assert sign_flip_p(values)[0] == pytest.approx(sign_flip_p(values[:2, 0]))


def test_the_same_seed_gives_the_same_numbers():
    values = np.random.default_rng(5).normal(size=(30, 4))
    np.testing.assert_array_equal(bootstrap_interval(values), bootstrap_interval(values))
    np.testing.assert_array_equal(sign_flip_p(values), sign_flip_p(values))
