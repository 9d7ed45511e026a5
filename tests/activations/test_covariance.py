"""Covariances equal those of the whole array without its massive rows, whatever shards, threads and order."""

import itertools

import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_limits

from mi_pipe.activations.covariance import merged, shard_scatter, without
from mi_pipe.activations.harvest.covariance_choice import with_covariance
from mi_pipe.activations.harvest.scatter_files import ScatterFiles
from mi_pipe.activations.statistics import shard_sums
from mi_pipe.activations.storage_dtype import as_stored, decode, torch_store_dtype
from mi_pipe.core.place import LocalPlace
from mi_pipe.core.store import Store
from mi_pipe.models.hook_points import HookSite
from mi_pipe.models.info import ModelInfo
from tests.activations.harvests import HEADS, RESIDUAL, harvest_toy


def made_up(n_rows=6000, width=24, store_dtype="float16", massive=()):
    """Return stored rows with a mean far from zero, correlated channels, and massive rows at some places."""
    generator = torch.Generator().manual_seed(n_rows)
    values = torch.randn(n_rows, width, generator=generator) @ torch.randn(width, width, generator=generator)
    values += 40 * torch.randn(width, generator=generator)
    values[list(massive)] *= 90
    return as_stored(values.to(torch_store_dtype(store_dtype)))


def scatter_of(stored, store_dtype, n_threads=1, chunk_rows=700):
    chunks = [stored[start : start + chunk_rows] for start in range(0, len(stored), chunk_rows)]
    return shard_scatter(chunks, store_dtype, shard_sums(chunks, store_dtype, stored.shape[1]), n_threads)


def relative_error(found, expected):
    deviations = np.sqrt(np.diag(expected))
    return np.abs((found - expected) / np.outer(deviations, deviations)).max()


@pytest.mark.parametrize("store_dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("n_shards", [1, 5])
def test_it_equals_numpys_without_the_massive_rows(store_dtype, n_shards):
    massive = [0, 1999, 2000, 4321]
    stored = made_up(store_dtype=store_dtype, massive=massive)
    parts = [scatter_of(part, store_dtype) for part in np.array_split(stored, n_shards)]
    total = parts[0]
    for part in parts[1:]:
        total = merged(total, part)
    exact = decode(stored, store_dtype).astype(np.float64)
    found = without(total, decode(stored[massive], store_dtype))
    expected = np.cov(np.delete(exact, massive, axis=0), rowvar=False, bias=True)
    assert found.n_rows == len(stored) - len(massive)
    assert relative_error(total.covariance, np.cov(exact, rowvar=False, bias=True)) < 1e-6
    assert relative_error(found.covariance, expected) < 1e-6
    np.testing.assert_allclose(found.mean, np.delete(exact, massive, axis=0).mean(0), rtol=1e-9)


def test_three_rows_by_hand():
    stored = np.array([[1.0, 2.0], [3.0, 2.0], [2.0, 5.0]], np.float32)
    found = scatter_of(stored, "float32")
    np.testing.assert_allclose(found.mean, [2, 3])
    np.testing.assert_allclose(found.covariance, [[2 / 3, 0], [0, 2]], atol=1e-6)


def test_a_massive_row_leaves_no_trace():
    plain, with_one = made_up(2000), made_up(2000, massive=[7])
    found = without(scatter_of(with_one, "float16"), decode(with_one[[7]], "float16"))
    expected = without(scatter_of(plain, "float16"), decode(plain[[7]], "float16"))
    assert relative_error(found.covariance, expected.covariance) < 1e-6


def test_the_number_of_threads_does_not_change_a_bit():
    stored = made_up(1500, width=576)
    one = scatter_of(stored, "float16")
    for n_threads, blas in ((1, 2), (3, 1), (4, 2)):
        with threadpool_limits(blas, user_api="blas"):
            again = scatter_of(stored, "float16", n_threads)
        assert again.matrix.tobytes() == one.matrix.tobytes()


def test_rows_that_are_all_zero_but_a_few_are_no_difficulty():
    stored = np.zeros((50, 3), np.float16)
    stored[:20] = 1
    np.testing.assert_allclose(scatter_of(stored, "float16").covariance, np.full((3, 3), 0.4 * 0.6))


@pytest.mark.parametrize("n_shards", [1, 2, 3, 7, 8])
def test_the_order_of_shards_does_not_change_a_bit_nor_does_what_is_lost(tmp_path, n_shards):
    shards = [scatter_of(part, "float16") for part in np.array_split(made_up(900, 6), n_shards)]
    rng = np.random.default_rng(0)
    roots = set()
    for trial in range(12):
        place = LocalPlace(tmp_path / str(trial))
        files = ScatterFiles(place, "hook", n_shards)
        kept = rng.permutation(n_shards)[: n_shards if trial % 2 else rng.integers(0, n_shards + 1)]
        for shard in [*kept, *kept[:2]]:
            ScatterFiles(place, "hook", n_shards).add(int(shard), shards[shard])
        if len(kept) == n_shards:
            assert len(list(place.keys())) <= n_shards.bit_count()
        for key in itertools.islice(place.keys(), int(trial % 3 == 2)):
            place.write(key, b"torn")
        root = files.total(lambda shard: shards[shard])
        roots.add((root.n_rows, root.mean.tobytes(), root.matrix.tobytes()))
    assert len(roots) == 1
    assert roots.pop()[0] == 900


def test_a_killed_merge_is_no_loss(tmp_path):
    shards = [scatter_of(part, "float16") for part in np.array_split(made_up(900, 6), 4)]
    place = LocalPlace(tmp_path)
    for shard in range(3):
        ScatterFiles(place, "hook", 4).add(shard, shards[shard])
    expected = ScatterFiles(place, "hook", 4).total(lambda shard: shards[shard])

    class Killed(LocalPlace):
        def remove(self, key):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ScatterFiles(Killed(tmp_path), "hook", 4).add(3, shards[3])
    found = ScatterFiles(place, "hook", 4).total(lambda shard: pytest.fail("all shards are kept"))
    assert found.matrix.tobytes() == expected.matrix.tobytes()


def test_a_harvest_keeps_it_and_stores_without_it_stay_readable(tmp_path):
    acts = harvest_toy(Store(tmp_path), [30] * 20, massive_factor=1.4)
    bare = harvest_toy(Store(tmp_path), [30] * 20, massive_factor=1.4, covariance="never")
    for hook in (RESIDUAL, HEADS):
        rows = acts.read_rows(hook, 0, acts.n_rows)[~acts.massive(hook)].astype(np.float64)
        found = acts.statistics(hook)
        assert found.n_massive > 0
        assert relative_error(found.covariance, np.cov(rows, rowvar=False, bias=True)) < 1e-6
        np.testing.assert_allclose(np.diag(found.covariance), found.variance, rtol=1e-5)
        assert bare.statistics(hook).covariance is None
        np.testing.assert_array_equal(bare.statistics(hook).mean, found.mean)
    assert not any("covariance" in key for key in bare.read_tensors("statistics.safetensors"))


def test_what_was_kept_while_writing_and_what_is_computed_at_the_end_are_the_same_bytes(tmp_path, monkeypatch):
    fields = {"massive_factor": 1.4, "shard_rows": 256}
    added, add = [], ScatterFiles.add
    monkeypatch.setattr(ScatterFiles, "add", lambda self, shard, it: (added.append(shard), add(self, shard, it)))
    kept = harvest_toy(Store(tmp_path / "kept"), [30] * 40, **fields)
    assert sorted(added) == sorted([*range(5)] * 2)
    monkeypatch.setattr(ScatterFiles, "add", lambda *_: None)
    computed = harvest_toy(Store(tmp_path / "computed"), [30] * 40, **fields)
    for hook in (RESIDUAL, HEADS):
        assert kept.statistics(hook).covariance.tobytes() == computed.statistics(hook).covariance.tobytes()


def test_small_shards_keep_none(tmp_path, monkeypatch):
    monkeypatch.setattr(ScatterFiles, "add", lambda *_: pytest.fail("the scatter is larger than the shard"))
    assert harvest_toy(Store(tmp_path), [30] * 8).statistics(RESIDUAL).covariance is not None


def site(name, width):
    return HookSite(name, (width,), None, "out")


def test_auto_keeps_what_costs_next_to_nothing():
    info = ModelInfo("LlamaForCausalLM", 30, 576, 9, 3, 64, 1536, 49152, 2048, False, False)
    one = [site("blocks.15.hook_resid_post", 576)]
    every = [site(f"blocks.{i}.hook_resid_post", 576) for i in range(30)]
    assert with_covariance("auto", one, info) == {one[0].name}
    assert with_covariance("auto", every, info) == frozenset()
    assert with_covariance("always", every, info) == {item.name for item in every}
    assert with_covariance("never", one, info) == frozenset()
    wide = [*one, site("blocks.15.mlp.hook_post", 1536)]
    assert with_covariance("auto", wide, info) == {one[0].name}
