"""A stored harvest read by mi_pipe, and by zarr, xarray, dask and pandas without it."""

import numpy as np
import pandas as pd
import pytest
import torch

import mi_pipe
from mi_pipe.activations.harvest.forward import ForwardPass
from mi_pipe.core.errors import ArtifactDamagedError, ConfigError, HookPointError
from mi_pipe.core.store import Store
from tests.activations.harvests import HEADS, RESIDUAL, harvest_toy
from tests.stages.toys import toy_model

LENGTHS = [20] * 12 + [33, 7, 7, 20, 64, 1, 40]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("acts")


@pytest.fixture(scope="module")
def acts(root):
    return harvest_toy(Store(root), LENGTHS, precision="float32", store_dtype="float32", massive_factor=1.2)


@pytest.fixture(scope="module")
def expected(root, acts):
    """Every prompt run alone, in float32."""
    from mi_pipe.models.source import load_source
    from tests.activations.harvests import random_prompts

    prompts = random_prompts(Store(root), LENGTHS)
    forward = ForwardPass(load_source(toy_model(Store(root)), "cpu"), [RESIDUAL, HEADS], "float32", "float32")
    runs = [forward.exact(prompts.prompt(i)[None], np.ones((1, n), bool)) for i, n in enumerate(LENGTHS)]
    return {hook: np.concatenate([run[hook] for run in runs]) for hook in (RESIDUAL, HEADS)}


def test_rows_are_the_models_values_in_prompt_order(acts, expected):
    assert acts.hooks == [RESIDUAL, HEADS]
    assert (acts.n_rows, acts.n_prompts, acts.width(HEADS)) == (sum(LENGTHS), len(LENGTHS), 32)
    for hook in acts.hooks:
        np.testing.assert_allclose(acts.read_rows(hook, 0, acts.n_rows), expected[hook], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(acts.read_rows(hook, 60, 70), expected[hook][60:70], rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(np.diff(acts.prompt_offset), LENGTHS)
    np.testing.assert_array_equal(acts.prompt_idx, np.repeat(np.arange(len(LENGTHS)), LENGTHS))
    np.testing.assert_array_equal(acts.pos, np.concatenate([np.arange(n) for n in LENGTHS]))


def test_rows_are_taken_in_any_order_with_repeats(acts):
    whole = acts.read_rows(RESIDUAL, 0, acts.n_rows)
    rows = np.random.default_rng(0).integers(0, acts.n_rows, 100)
    np.testing.assert_array_equal(acts.take(RESIDUAL, rows), whole[rows])
    assert acts.take(RESIDUAL, np.array([], int)).shape == (0, 32)
    for bad in ([-1, 2], [acts.n_rows]):
        with pytest.raises(IndexError):
            acts.take(RESIDUAL, np.array(bad))
    with pytest.raises(IndexError):
        acts.read_rows(RESIDUAL, acts.n_rows - 2, acts.n_rows + 1)


def test_other_programs_open_it_as_it_is(acts):
    import dask.array as da
    import xarray as xr
    import zarr

    whole = acts.read_rows(RESIDUAL, 0, acts.n_rows)
    np.testing.assert_array_equal(zarr.open_group(acts.path / "activations.zarr", mode="r")[RESIDUAL][:], whole)
    dataset = xr.open_zarr(acts.path / "activations.zarr", consolidated=False)
    assert dataset[RESIDUAL].dims == ("token", "d_model")
    assert set(dataset[RESIDUAL].coords) == {"token_id", "prompt_idx", "pos"}
    at_three = dataset[RESIDUAL].where((dataset.pos == 3).compute(), drop=True)
    np.testing.assert_array_equal(at_three, whole[acts.pos == 3])
    array = da.from_zarr(str(acts.path / "activations.zarr"), component=RESIDUAL)
    np.testing.assert_allclose(array.mean(0).compute(), whole.mean(0), rtol=1e-5)
    table = pd.read_parquet(acts.path / "tokens.parquet")
    assert list(table)[:5] == ["row", "prompt_idx", "pos", "token_id", "text"]
    np.testing.assert_array_equal(table["token_id"], dataset.token_id)
    np.testing.assert_array_equal(table[f"massive:{HEADS}"], acts.massive(HEADS))
    assert (pd.read_parquet(acts.path / "prompts.parquet")["n_tokens"].to_numpy() == LENGTHS).all()


def test_frames_are_lazy_and_hold_the_rows_asked_for(acts):
    whole = acts.read_rows(RESIDUAL, 0, acts.n_rows)
    np.testing.assert_array_equal(acts.to_xarray()[RESIDUAL].isel(token=slice(5, 9)), whole[5:9])
    np.testing.assert_array_equal(acts.to_dask(HEADS)[10:20].compute(), acts.read_rows(HEADS, 10, 20))
    assert acts.to_dask(HEADS).chunks[0][0] == acts.shard_rows
    token = acts.table()["text"].iloc[45]
    frame = acts.to_pandas(RESIDUAL, where=f"token == {token!r} and pos > 2", columns=[0, 31])
    rows = frame.index.to_numpy()
    assert 45 in rows
    assert (frame["text"] == token).all()
    np.testing.assert_array_equal(frame[[0, 31]], whole[rows][:, [0, 31]])
    assert len(acts.to_pandas(RESIDUAL)) == acts.n_rows
    assert set(rows) <= set(acts.tokens(token).index)
    assert len(acts.tokens(" none such")) == 0
    prompt = acts.prompt(12)
    np.testing.assert_array_equal(prompt[RESIDUAL], whole[240:273])
    assert prompt["text"].to_numpy().tolist() == acts.table()["text"].iloc[240:273].astype(str).tolist()
    with pytest.raises(IndexError):
        acts.prompt(len(LENGTHS))
    with pytest.raises(ConfigError, match="cannot be evaluated"):
        acts.to_pandas(RESIDUAL, where="nonsense == 3")


def test_statistics_equal_numpy_on_the_stored_rows(acts):
    for hook in acts.hooks:
        whole = acts.read_rows(hook, 0, acts.n_rows).astype(np.float64)
        norms = np.linalg.norm(whole, axis=1)
        massive = norms > 1.2 * np.median(norms)
        found = acts.statistics(hook)
        assert found.n_massive == massive.sum() > 0
        np.testing.assert_array_equal(acts.massive(hook), massive)
        np.testing.assert_allclose(found.mean, whole[~massive].mean(0), rtol=1e-8, atol=1e-10)
        np.testing.assert_allclose(found.variance, whole[~massive].var(0), rtol=1e-8)


def test_bfloat16_is_stored_as_bits_and_read_as_numbers(root, acts):
    bits = harvest_toy(Store(root), LENGTHS, precision="float32", store_dtype="bfloat16")
    expected = torch.from_numpy(acts.read_rows(RESIDUAL, 0, acts.n_rows)).bfloat16().float().numpy()
    assert bits.group[RESIDUAL].dtype == np.uint16
    assert bits.group[RESIDUAL].attrs["logical_dtype"] == "bfloat16"
    np.testing.assert_array_equal(bits.read_rows(RESIDUAL, 0, acts.n_rows), expected)
    np.testing.assert_array_equal(bits.to_dask(RESIDUAL).compute(), expected)
    np.testing.assert_array_equal(bits.to_xarray()[RESIDUAL], expected)
    np.testing.assert_array_equal(bits.to_pandas(RESIDUAL)[list(range(32))], expected)


def test_the_split_is_by_prompt_and_the_same_for_everyone(acts, root):
    train, held_out = acts.prompt_split(0.2, seed=3)
    assert (train ^ held_out).all()
    by_prompt = pd.Series(held_out).groupby(acts.prompt_idx).nunique()
    assert (by_prompt == 1).all()
    assert pd.Series(held_out).groupby(acts.prompt_idx).first().sum() == round(0.2 * len(LENGTHS))
    np.testing.assert_array_equal(mi_pipe.open(acts.path).prompt_split(0.2, seed=3)[1], held_out)
    assert (acts.prompt_split(0.2, seed=4)[1] != held_out).any()
    assert not acts.prompt_split(0.0, seed=3)[1].any()
    for fraction in (1.0, -0.1, 0.99):
        with pytest.raises(ConfigError):
            acts.prompt_split(fraction, seed=0)


def test_a_hook_that_is_not_stored_is_answered_with_those_that_are(acts):
    with pytest.raises(HookPointError, match=r"blocks\.0\.hook_resid_post"):
        acts.read_rows("blocks.0.hook_resid_pots", 0, 1)


def damage(acts, how):
    path = acts.path / "activations.zarr" / RESIDUAL / "c" / "2" / "0"
    path.chmod(0o644)
    data = bytearray(path.read_bytes())
    if how == "flip":
        data[100] ^= 4
    elif how == "cut":
        del data[-10:]
    elif how == "empty":
        data.clear()
    path.write_bytes(data)
    if how == "gone":
        path.unlink()


@pytest.mark.parametrize("how", ["flip", "cut", "empty", "gone"])
def test_a_damaged_shard_is_never_read_as_data(tmp_path, how):
    whole = harvest_toy(Store(tmp_path), [40] * 8)
    whole.check()
    damage(whole, how)
    with pytest.raises(ArtifactDamagedError, match="c/2/0"):
        whole.check()
    if how != "flip":
        with pytest.raises(ArtifactDamagedError, match="c/2/0"):
            mi_pipe.open(whole.path)
    assert np.isfinite(whole.read_rows(RESIDUAL, 0, 128)).all(), "other shards stay readable"
    for read in (
        lambda: whole.read_rows(RESIDUAL, 120, 140),
        lambda: whole.take(RESIDUAL, np.array([3, 130])),
        lambda: whole.prompt(3),
        lambda: whole.to_pandas(RESIDUAL, where="row == 129"),
    ):
        with pytest.raises(ArtifactDamagedError, match="c/2/0"):
            read()
