"""Statistics equal whole-array numpy, whatever the shards; massive rows are left out."""

import numpy as np
import pytest
import torch

from mi_pipe.activations.harvest.precision import precision_error
from mi_pipe.activations.statistics import HookStatistics, combine, massive_threshold, shard_sums
from mi_pipe.activations.storage_dtype import as_stored, decode, torch_store_dtype


def sums_of(stored, store_dtype, n_shards):
    parts = np.array_split(stored, n_shards)
    return [shard_sums(np.array_split(part, 3), store_dtype, stored.shape[1]) for part in parts]


def statistics_of(stored, store_dtype, n_shards, factor=10.0):
    sums = sums_of(stored, store_dtype, n_shards)
    norms = np.concatenate([item.norms for item in sums])
    massive = norms > massive_threshold(norms, factor)[1]
    return combine(sums, massive, decode(stored[massive], store_dtype), factor), massive


@pytest.mark.parametrize("store_dtype", ["float16", "float32", "bfloat16"])
@pytest.mark.parametrize("n_shards", [1, 7])
def test_they_equal_the_whole_array_without_its_massive_rows(store_dtype, n_shards):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(5000, 24, generator=generator) * 3 + torch.arange(24)
    values[::500] *= 300
    stored = as_stored(values.to(torch_store_dtype(store_dtype)))
    exact = decode(stored, store_dtype).astype(np.float64)
    found, massive = statistics_of(stored, store_dtype, n_shards)
    norms = np.linalg.norm(exact, axis=1)
    expected_massive = norms > 10 * np.median(norms)
    np.testing.assert_array_equal(massive, expected_massive)
    counted = exact[~expected_massive]
    assert (found.n_rows, found.n_massive) == (4990, 10)
    np.testing.assert_allclose(found.mean, counted.mean(0), rtol=1e-9)
    np.testing.assert_allclose(found.variance, counted.var(0), rtol=1e-8)
    assert found.median_norm == pytest.approx(np.median(norms), rel=1e-6)
    assert found.massive_threshold == pytest.approx(10 * np.median(norms), rel=1e-6)
    assert found.mean_norm == pytest.approx(norms[~massive].mean(), rel=1e-6)
    assert found.max_norm == pytest.approx(norms.max(), rel=1e-6)
    assert found.mean_square_norm == pytest.approx(np.square(norms[~massive]).mean(), rel=1e-9)
    assert found.mean_square_norm_centred == pytest.approx(np.square(counted - counted.mean(0)).sum(1).mean(), rel=1e-8)


def test_five_numbers_by_hand():
    stored = np.array([[1.0], [2.0], [3.0], [4.0], [100.0]], np.float32)
    found, massive = statistics_of(stored, "float32", 2, factor=5.0)
    assert massive.tolist() == [False] * 4 + [True]
    assert (found.median_norm, found.massive_threshold, found.n_rows) == (3.0, 15.0, 4)
    assert (found.mean[0], found.variance[0], found.mean_norm, found.max_norm) == (2.5, 1.25, 2.5, 100.0)


def test_they_survive_being_stored_exactly():
    stored = np.random.default_rng(0).standard_normal((50, 3)).astype(np.float32)
    found, _ = statistics_of(stored, "float32", 3)
    again = HookStatistics.from_tensors(found.to_tensors("hook"), "hook")
    np.testing.assert_array_equal(again.mean, found.mean)
    assert (again.median_norm, again.n_rows, again.max_norm) == (found.median_norm, found.n_rows, found.max_norm)


def test_rows_that_are_not_finite_are_counted():
    stored = np.ones((40, 3), np.float16)
    stored[3, 1], stored[30, 0] = np.inf, np.nan
    assert shard_sums([stored], "float16", 3).n_nonfinite == 2


def test_precision_error_by_hand_without_massive_rows():
    reference = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.0, 2.0], [500.0, 0.0]], np.float32)
    stored = reference + np.array([[0.1, 0.0], [0.0, 0.0], [0.0, -0.1], [0.0, 0.0], [99.0, 0.0]], np.float32)
    error = precision_error(reference, stored, 10.0)
    assert (error.n_rows, error.n_massive) == (4, 1)
    assert error.relative_error == pytest.approx(np.sqrt(0.02 / 8), rel=1e-5)
    assert error.fvu_added == pytest.approx(0.02 / (8 - 4 * (0.5**2 + 1.0**2)), rel=1e-5)
