"""CKA by sums over rows against Gram matrices written out, and what it must not depend on."""

import numpy as np
import pytest

from mi_pipe.activations.harvest.capture import capture
from mi_pipe.core.errors import ConfigError
from mi_pipe.similarity.cka import cka
from tests.activations.harvests import HEADS, RESIDUAL, harvest_toy
from tests.similarity.planted import Maps, mapped_store, selections


def biased_by_gram(x, y):
    centring = np.eye(len(x)) - 1 / len(x)
    k, ell = centring @ x @ x.T @ centring, centring @ y @ y.T @ centring
    return (k * ell).sum() / np.sqrt((k * k).sum() * (ell * ell).sum())


def unbiased_hsic(x, y):
    """Song et al. 2012, equation 5, word for word, on rows that are not centred."""
    n, one = len(x), np.ones(len(x))
    k, ell = x @ x.T, y @ y.T
    np.fill_diagonal(k, 0)
    np.fill_diagonal(ell, 0)
    sums = (one @ k @ one) * (one @ ell @ one) / ((n - 1) * (n - 2))
    return (np.trace(k @ ell) + sums - 2 / (n - 2) * one @ k @ ell @ one) / (n * (n - 3))


def debiased_by_gram(x, y):
    return unbiased_hsic(x, y) / np.sqrt(unbiased_hsic(x, x) * unbiased_hsic(y, y))


@pytest.fixture
def related(store):
    """Three hook points: rows, a noisy map of them to another width, and rows that have nothing to do with them."""
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(300, 20)) * rng.uniform(0.2, 3, 20) + rng.normal(size=20) * 4
    rows[:, 8:14] += rows[:, :6]
    return mapped_store(store, rows, selections(8, 6, 6))


@pytest.mark.parametrize("memory_bytes", [1, 1 << 29])
def test_both_estimators_are_those_of_gram_matrices(related, memory_bytes):
    found = cka(related, memory_bytes=memory_bytes)
    values = [related.read_rows(hook, 0, related.n_rows).astype(np.float64) for hook in related.hooks]
    for i, x in enumerate(values):
        for j, y in enumerate(values):
            assert found["cka_biased"].values[i, j] == pytest.approx(biased_by_gram(x, y), abs=2e-6)
            assert found["cka"].values[i, j] == pytest.approx(debiased_by_gram(x, y), abs=2e-6)
    assert found["cka"].sel(hook="maps.0", other_hook="maps.1") > 0.2
    np.testing.assert_allclose(np.diag(found["cka"]), 1)
    squares = np.square(values[1] - values[1].mean(0)).sum(1)
    assert found["effective_rows"].sel(hook="maps.1").item() == pytest.approx(squares.sum() ** 2 / (squares**2).sum())
    assert found["other_effective_rows"].dims == ("other_hook",)


def test_chance_is_the_mean_over_permutations(related):
    found = cka(related)["chance"].sel(hook="maps.0", other_hook="maps.1").item()
    x, y = (related.read_rows(f"maps.{i}", 0, 300).astype(np.float64) for i in range(2))
    x, y = x - x.mean(0), y - y.mean(0)
    rng = np.random.default_rng(1)
    norm = np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y)
    drawn = [np.square(x.T @ y[rng.permutation(300)]).sum() / norm for _ in range(400)]
    assert found == pytest.approx(np.mean(drawn), abs=4 * np.std(drawn) / 20)


def test_rotations_and_scale_change_nothing_and_another_metric_does(store):
    rng = np.random.default_rng(2)
    rotation = np.linalg.qr(rng.normal(size=(10, 10)))[0]
    matrices = [np.eye(10), 7.5 * rotation, np.diag([30.0, *[1] * 9])]
    found = cka(mapped_store(store, rng.normal(size=(200, 10)), matrices))["cka"].values
    assert found[0, 1] == pytest.approx(1, abs=1e-5)
    assert found[0, 2] < 0.6


def test_independent_rows_are_near_zero_only_without_the_bias(store):
    rows = np.random.default_rng(3).normal(size=(120, 160))
    found = cka(mapped_store(store, rows, selections(80, 80)), n_groups=4)
    one = found.isel(hook=0, other_hook=1)
    assert one["cka_biased"] > 0.3
    assert one["cka_biased"] == pytest.approx(one["chance"].item(), abs=0.02)
    assert abs(one["cka"].item()) < 0.03
    assert 0 < one["standard_error"].item() < 0.1


def test_two_stores_are_compared_at_the_tokens_that_both_have(store):
    lengths = [9, 12, 7, 10] * 5
    whole, later = harvest_toy(store, lengths), harvest_toy(store, lengths, positions="pos >= 2")
    assert later.n_rows < whole.n_rows
    found = cka(whole, later)
    assert found.attrs["n_rows"] == later.n_rows
    assert found.attrs["other_store"] == later.id
    assert found["cka"].sel(hook=RESIDUAL, other_hook=RESIDUAL).item() == pytest.approx(1)
    alone = cka(later, hooks=[RESIDUAL], other_hooks=[HEADS])
    np.testing.assert_allclose(found["cka"].sel(hook=RESIDUAL, other_hook=HEADS), alone["cka"].values[0, 0], rtol=1e-5)
    backwards = cka(later, whole)["cka"]
    np.testing.assert_allclose(backwards.values, found["cka"].values.T, rtol=1e-5)


def test_stores_of_different_tokens_are_refused(store):
    first = harvest_toy(store, [9, 12, 7])
    second = harvest_toy(store, [9, 11, 8])
    with pytest.raises(ConfigError, match=r"of different tokens \(prompt 2, position 1 .* models of one tokenizer"):
        cka(first, second)


def test_massive_rows_are_left_out_unless_asked_for(store):
    rng = np.random.default_rng(4)
    rows = rng.normal(size=(100, 12))
    rows[17] *= 500
    acts = capture(Maps(selections(6, 6)), rows.astype(np.float32), ["maps.0", "maps.1"], store)
    assert acts.massive("maps.0").sum() == 1
    assert cka(acts).attrs["n_rows"] == 99
    assert abs(cka(acts)["cka"].values[0, 1]) < 0.1
    assert cka(acts, with_massive=True)["cka_biased"].values[0, 1] > 0.99


def test_too_few_rows_and_groups_are_refused(related):
    with pytest.raises(ConfigError, match="at least 4 rows"):
        cka(related, where="row < 3")
    with pytest.raises(ConfigError, match="No row of capture"):
        cka(related, where="row < 0")
    with pytest.raises(ConfigError, match="9 groups of prompts were asked for, and there are 5"):
        cka(related, where="row < 5", n_groups=9)
