"""Mutual nearest neighbours against scikit-learn's, and what they must not depend on."""

import numpy as np
import pytest
from sklearn.neighbors import NearestNeighbors

from mi_pipe.core.errors import ConfigError
from mi_pipe.similarity.nearest import nearest
from mi_pipe.similarity.neighbours import mutual_neighbours
from tests.activations.harvests import HEADS, RESIDUAL, harvest_toy
from tests.similarity.planted import mapped_store, selections

LENGTHS = [9, 12, 7, 10] * 6


def by_sklearn(values, k):
    found = NearestNeighbors(n_neighbors=k + 1, metric="cosine", algorithm="brute").fit(values).kneighbors(values)[1]
    return [[j for j in row if j != i][:k] for i, row in enumerate(found)]


def test_neighbours_are_those_of_scikit_learn():
    values = np.random.default_rng(0).normal(size=(1500, 8)).astype(np.float32) + 0.5
    assert nearest(values, 5).tolist() == by_sklearn(values, 5)


def test_overlap_is_the_mean_share_of_common_neighbours(store):
    rng = np.random.default_rng(1)
    rows = rng.normal(size=(400, 12))
    rows[:, 6:] = rows[:, :6] + 0.4 * rng.normal(size=(400, 6))
    acts = mapped_store(store, rows, selections(6, 6))
    found = mutual_neighbours(acts, k=7, centred=False)
    first, second = (by_sklearn(acts.read_rows(hook, 0, 400), 7) for hook in acts.hooks)
    expected = np.mean([len(set(a) & set(b)) / 7 for a, b in zip(first, second, strict=True)])
    one = found.sel(hook="maps.0", other_hook="maps.1")
    assert one["overlap"].item() == pytest.approx(expected)
    assert one["low"] < one["overlap"] < one["high"]
    assert found.attrs["chance"] == pytest.approx(7 / 399)
    np.testing.assert_array_equal(np.diag(found["overlap"]), 1)


def test_rotations_and_scale_change_nothing_and_unrelated_rows_share_what_chance_gives(store):
    rng = np.random.default_rng(2)
    rotation = np.zeros((16, 8))
    rotation[:8] = 3 * np.linalg.qr(rng.normal(size=(8, 8)))[0]
    acts = mapped_store(store, rng.normal(size=(500, 16)), [*selections(8, 8), rotation])
    found = mutual_neighbours(acts, k=20)["overlap"].values
    assert found[0, 2] == pytest.approx(1, abs=1e-3)
    assert found[0, 1] == pytest.approx(20 / 499, abs=0.01)


def test_equal_rows_are_taken_in_one_random_order(store):
    acts = mapped_store(store, np.repeat(np.eye(3), 40, axis=0), [np.eye(3), 2 * np.eye(3)])
    found = mutual_neighbours(acts, k=4, centred=False)
    assert found["overlap"].values[0, 1] == 1
    rng = np.random.default_rng(4)
    turned = np.linalg.qr(rng.normal(size=(48, 48)))[0]
    often = mapped_store(store, rng.normal(size=(20, 48))[rng.integers(0, 20, 521)], [np.eye(48), turned])
    assert mutual_neighbours(often, k=10)["overlap"].values[0, 1] == 1, "rounding is no order"
    order = np.random.default_rng(0).permutation(120)
    neighbours = nearest(np.repeat(np.eye(3), 40, axis=0).astype(np.float32), 4, order)
    assert neighbours[0].max() > 4, "not those that happen to stand first in the store"


def test_two_stores_of_the_same_prompts_and_only_other_prompts(store):
    first = harvest_toy(store, LENGTHS)
    second = harvest_toy(store, LENGTHS, store_dtype="float32", positions="pos > 0")
    found = mutual_neighbours(first, second, n_rows=150, k=5, other_prompts_only=True)
    assert found.attrs["n_rows"] == 150
    assert found["overlap"].sel(hook=RESIDUAL, other_hook=RESIDUAL) > 0.99
    assert found["overlap"].sel(hook=RESIDUAL, other_hook=HEADS) < 0.9
    values = np.random.default_rng(3).normal(size=(60, 4)).astype(np.float32)
    prompts = np.repeat(np.arange(6), 10)
    assert (prompts[nearest(values, 3, groups=prompts)] != prompts[:, None]).all()


def test_a_k_that_there_are_no_rows_for_is_refused(store):
    acts = harvest_toy(store, LENGTHS)
    with pytest.raises(ConfigError, match="k is 50; it has to be at least 1, and there are 29 rows"):
        mutual_neighbours(acts, k=50, n_rows=30)
    with pytest.raises(ConfigError, match="n_rows is 0"):
        mutual_neighbours(acts, n_rows=0)
