import numpy as np
import pytest
from sklearn.metrics import r2_score, roc_auc_score

from mi_pipe.core.bootstrap import draw_weights
from mi_pipe.probes.control import control_labels
from mi_pipe.probes.scores import accuracy, auc, difference, r_squared


def test_worked_examples():
    scores = np.array([[2.0], [-1.0], [0.5], [-3.0]])
    y, cluster = np.array([1, 1, 0, 0]), np.array([0, 0, 1, 1])
    assert accuracy(scores, y, cluster).value == 0.5
    assert auc(scores, y, cluster).value == 0.75
    found = r_squared(np.array([1.0, 2.0, 3.0]), np.array([1.0, 2.0, 4.0]), np.arange(3))
    assert found.value == pytest.approx(1 - 1 / (14 / 3))


def test_auc_and_r_squared_are_scikit_learns_with_ties():
    rng = np.random.default_rng(0)
    y, cluster = rng.integers(0, 2, 400), np.repeat(np.arange(100), 4)
    scores = np.round(y + rng.normal(size=400), 1)[:, None]
    assert auc(scores, y, cluster).value == pytest.approx(roc_auc_score(y, scores))
    three = rng.integers(0, 3, 400)
    logits = rng.normal(size=(400, 3)) + np.eye(3)[three]
    wanted = np.mean([roc_auc_score(three == k, logits[:, k]) for k in range(3)])
    assert auc(logits, three, cluster).value == pytest.approx(wanted)
    real = rng.normal(size=400) * 3 + 1000
    guess = real + rng.normal(size=400)
    assert r_squared(guess, real, cluster).value == pytest.approx(r2_score(real, guess))


def test_intervals_draw_whole_prompts():
    """A figure that is the same at all rows of a prompt is as uncertain as the number of prompts says."""
    rng = np.random.default_rng(1)
    right = rng.integers(0, 2, 50)
    y = np.repeat(right, 40)
    cluster = np.repeat(np.arange(50), 40)
    found = accuracy(np.ones((2000, 1)), y, cluster)
    drawn = np.percentile(draw_weights(50) @ right / 50, [2.5, 97.5])
    assert (found.low, found.high) == pytest.approx(tuple(drawn))
    assert found.high - found.low > 0.2
    area = auc(y[:, None] + rng.normal(size=(2000, 1)), y, cluster)
    assert area.low < area.value < area.high
    one = auc(np.arange(4.0)[:, None], np.ones(4, int), np.arange(4))
    assert np.isnan([one.value, one.low, one.high]).all()


def test_control_labels_are_one_a_type_with_the_real_ones_shares():
    rng = np.random.default_rng(2)
    types = rng.integers(0, 3000, 9000)
    real = (rng.random(2000) < 0.2).astype(int)
    drawn = control_labels(types, real, seed=0)
    assert drawn is not None
    assert all(len(np.unique(drawn[types == i])) == 1 for i in np.unique(types)[:50])
    by_type = [drawn[types == i][0] for i in np.unique(types)]
    assert np.mean(by_type) == pytest.approx(real.mean(), abs=0.03)
    np.testing.assert_array_equal(drawn, control_labels(types, rng.permutation(real), seed=0))
    assert (drawn != control_labels(types, real, seed=1)).any()
    assert control_labels(np.zeros(9), real, seed=0) is None


def test_a_difference_is_drawn_with_the_same_prompts():
    """Two figures that move together differ by the same whatever prompts are drawn."""
    rng = np.random.default_rng(4)
    y, cluster = np.ones(60, int), np.repeat(np.arange(30), 2)
    right = np.tile([1.0, -1.0], 30)
    right[: 2 * 12] = 1.0
    half_of_each = accuracy(np.tile([1.0, -1.0], 30)[:, None], y, cluster)
    first = accuracy(right[:, None], y, cluster)
    found = difference(first, half_of_each)
    shares = np.repeat([0.5, 0.0], [12, 18])
    drawn = np.percentile(draw_weights(30) @ shares / 30, [2.5, 97.5])
    assert found.value == pytest.approx(0.2)
    assert (found.low, found.high) == pytest.approx(tuple(drawn))
    numbers, guess = rng.normal(size=60), rng.normal(size=60)
    same = r_squared(guess, numbers, cluster)
    none = difference(same, same)
    assert (none.value, none.low, none.high) == (0, 0, 0)
