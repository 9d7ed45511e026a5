"""The analyst's side of a store: only what is asked for is read, mistakes are one sentence."""

import os
import pickle

import numpy as np
import pandas as pd
import pytest

from mi_pipe.core.errors import ArtifactDamagedError, ConfigError, HookPointError
from mi_pipe.core.store import Store
from mi_pipe.export.hdf5 import export_hdf5
from tests.activations.harvests import HEADS, RESIDUAL, harvest_toy

LENGTHS = [20] * 12 + [33, 7, 7, 20, 64, 1, 40]


@pytest.fixture(scope="module", params=["float16", "float32", "bfloat16"])
def acts(request, tmp_path_factory):
    store = Store(tmp_path_factory.mktemp("frames"))
    return harvest_toy(store, LENGTHS, precision="float32", store_dtype=request.param, massive_factor=1.2)


@pytest.fixture(scope="module")
def whole(acts):
    return {hook: acts.read_rows(hook, 0, acts.n_rows) for hook in acts.hooks}


def remove_shards(acts, *shards: int) -> None:
    for hook in acts.hooks:
        for shard in shards:
            (acts.path / "activations.zarr" / hook / "c" / str(shard) / "0").unlink()


def test_a_condition_picks_rows_and_columns_pick_values(acts, whole):
    table = acts.table()
    token = str(table["text"].iloc[45])
    frame = acts.to_pandas(RESIDUAL, where=f"token == {token!r} and pos > 2", columns=[31, 0])
    expected = table[(table["text"] == token) & (table["pos"] > 2)]
    assert frame.index.name == "row"
    assert frame.index.tolist() == expected["row"].tolist()
    assert list(frame) == ["prompt_idx", "pos", "token_id", "text", f"massive:{RESIDUAL}", 31, 0]
    np.testing.assert_array_equal(frame[[31, 0]], whole[RESIDUAL][frame.index][:, [31, 0]])
    np.testing.assert_array_equal(frame["pos"], expected["pos"])
    assert frame[0].dtype == np.float32
    everything = acts.to_pandas(RESIDUAL)
    np.testing.assert_array_equal(everything[list(range(32))], whole[RESIDUAL])
    massive = acts.to_pandas(HEADS, where="massive", columns=[])
    assert massive.index.tolist() == np.flatnonzero(acts.massive(HEADS)).tolist()
    assert len(massive) > 0
    assert len(acts.to_pandas(HEADS, where="pos == 1000")) == 0


def test_several_hook_points_have_columns_of_two_levels(acts, whole):
    frame = acts.to_pandas([RESIDUAL, HEADS], where="pos == 3", columns=range(4))
    rows = np.flatnonzero(acts.pos == 3)
    assert frame.index.tolist() == rows.tolist()
    for hook in (RESIDUAL, HEADS):
        np.testing.assert_array_equal(frame[hook], whole[hook][rows][:, :4])
        np.testing.assert_array_equal(frame[f"massive:{hook}"], acts.massive(hook)[rows])
    assert (frame["pos"] == 3).all()


def test_xarray_and_dask_hold_the_stored_values_with_their_coordinates(acts, whole):
    dataset = acts.to_xarray()
    assert list(dataset.data_vars) == [RESIDUAL, HEADS]
    assert set(dataset.coords) == {"token_id", "prompt_idx", "pos"}
    assert dataset[RESIDUAL].dims == ("token", "d_model")
    assert dataset[HEADS].attrs["token_shape"] == [4, 8]
    assert dataset.attrs["hooks"] == [RESIDUAL, HEADS]
    for hook in acts.hooks:
        np.testing.assert_array_equal(dataset[hook], whole[hook])
        np.testing.assert_array_equal(acts.to_dask(hook).compute(), whole[hook])
    at_three = dataset[RESIDUAL].where((dataset.pos == 3).compute(), drop=True)
    np.testing.assert_array_equal(at_three, whole[RESIDUAL][acts.pos == 3])
    means = dataset[RESIDUAL].astype("float64").groupby("prompt_idx").mean().compute()
    expected = pd.DataFrame(whole[RESIDUAL].astype(np.float64)).groupby(acts.prompt_idx).mean()
    np.testing.assert_allclose(means, expected, rtol=1e-12, atol=1e-12)
    array = acts.to_dask(HEADS)
    assert array.chunks[0][0] == acts.shard_rows
    np.testing.assert_array_equal(array[3:200:7, 5:9].compute(), whole[HEADS][3:200:7, 5:9])
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(array))[60:70].compute(), whole[HEADS][60:70])
    np.testing.assert_allclose(array.astype("f8").mean(0).compute(), whole[HEADS].astype("f8").mean(0), rtol=1e-12)


def test_rows_tokens_and_prompts_are_found(acts, whole):
    table = acts.table()
    np.testing.assert_array_equal(acts.rows(), np.arange(acts.n_rows))
    np.testing.assert_array_equal(acts.rows("n_tokens == 7"), np.flatnonzero(np.isin(acts.prompt_idx, [13, 14])))
    token = str(table["text"].iloc[45])
    found = acts.tokens(token)
    assert found.index.tolist() == table[table["text"] == token]["row"].tolist()
    assert len(acts.tokens("' or True #")) == 0
    prompt = acts.prompt(12)
    np.testing.assert_array_equal(prompt[RESIDUAL], whole[RESIDUAL][240:273])
    assert prompt["text"].to_numpy().tolist() == table["text"].iloc[240:273].astype(str).tolist()
    np.testing.assert_array_equal(prompt["pos"], np.arange(33))


def test_only_shards_with_rows_asked_for_are_read(tmp_path):
    acts = harvest_toy(Store(tmp_path), [40] * 8)
    whole = acts.read_rows(RESIDUAL, 0, acts.n_rows)
    remove_shards(acts, 0, 2, 3, 4)
    frame = acts.to_pandas(RESIDUAL, where="row in [70, 127]")
    np.testing.assert_array_equal(frame[list(range(32))], whole[[70, 127]])
    np.testing.assert_array_equal(acts.to_dask(RESIDUAL)[64:128].compute(), whole[64:128])
    np.testing.assert_array_equal(acts.to_xarray()[RESIDUAL].isel(token=slice(70, 90)), whole[70:90])
    np.testing.assert_array_equal(acts.prompt(2)[RESIDUAL], whole[80:120])
    np.testing.assert_allclose(acts.mean(RESIDUAL, where="row > 100 and row < 110"), whole[101:110].mean(0), rtol=1e-3)


@pytest.mark.parametrize(
    "read",
    [
        lambda acts: acts.to_pandas(RESIDUAL),
        lambda acts: acts.to_dask(RESIDUAL).sum().compute(),
        lambda acts: acts.to_xarray()[RESIDUAL].sum().compute(),
        lambda acts: acts.by_token(RESIDUAL),
        lambda acts: acts.mean(RESIDUAL),
        lambda acts: acts.prompt(0),
    ],
)
def test_a_missing_shard_is_an_error_not_nan(tmp_path, read):
    acts = harvest_toy(Store(tmp_path), [40] * 8)
    remove_shards(acts, 0)
    with pytest.raises(ArtifactDamagedError, match="c/0/0"):
        read(acts)


def test_a_store_in_an_object_store_is_read_alike(tmp_path, bucket):
    local = harvest_toy(Store(tmp_path / "local"), [40] * 8)
    remote = harvest_toy(Store(tmp_path / "remote"), [40] * 8, destination=bucket)
    assert not (remote.path / "activations.zarr").exists()
    where = "pos > 3 and token_id < 40"
    pd.testing.assert_frame_equal(remote.to_pandas(RESIDUAL, where), local.to_pandas(RESIDUAL, where))
    pd.testing.assert_frame_equal(remote.by_token(HEADS), local.by_token(HEADS))
    pd.testing.assert_frame_equal(remote.by_layer(), local.by_layer())
    assert remote.prompt(3).identical(local.prompt(3))
    assert remote.to_xarray().compute().equals(local.to_xarray().compute())
    lazy = pickle.loads(pickle.dumps(remote.to_dask(RESIDUAL)))
    np.testing.assert_array_equal(lazy.compute(), local.to_dask(RESIDUAL).compute())
    files = [export_hdf5(acts, tmp_path / f"{name}.h5") for name, acts in (("a", local), ("b", remote))]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_mistakes_are_one_sentence(acts, monkeypatch):
    for wrong, message in [
        ({"where": "nonsense == 3"}, "no column 'nonsense'"),
        ({"where": "token = 3"}, "no expression"),
        ({"columns": [32]}, "values 0 to 31; there is no column 32"),
        ({"columns": [-1]}, "no column -1"),
        ({"columns": ["pos"]}, "no column 'pos'"),
        ({"columns": [True]}, "no column True"),
    ]:
        with pytest.raises(ConfigError, match=message):
            acts.to_pandas(RESIDUAL, **wrong)
    for read in (
        lambda: acts.to_pandas("blocks.0.hook_resid_pots"),
        lambda: acts.to_pandas([RESIDUAL, "blocks.0.hook_resid_pots"]),
        lambda: acts.to_dask("blocks.0.hook_resid_pots"),
        lambda: acts.by_token("blocks.0.hook_resid_pots"),
        lambda: acts.mean("blocks.0.hook_resid_pots"),
    ):
        with pytest.raises(HookPointError, match=r"Did you mean 'blocks\.0\.hook_resid_post'"):
            read()
    with pytest.raises(ConfigError, match="no column 'massive'"):
        acts.to_pandas([RESIDUAL, HEADS], where="massive")
    real = os.sysconf
    monkeypatch.setattr(os, "sysconf", lambda name: 1 if name == "SC_PHYS_PAGES" else real(name))
    with pytest.raises(ConfigError, match=r"use to_dask"):
        acts.to_pandas(RESIDUAL)


def test_it_says_what_it_is(acts):
    text = repr(acts)
    assert acts.id in text
    assert f"{acts.n_rows:,} rows of {acts.n_prompts} prompts, {acts.dtype}" in text
    assert f"{HEADS} (32)" in text
    page = acts._repr_html_()
    assert f"<code>{HEADS}</code></td><td>32</td><td>(4, 8)" in page
    acts.manifest.config["hooks"] = "untouched"
    hostile = type(acts)(acts.path)
    hostile.__dict__["_attributes"] = {**acts._attributes, "store_dtype": "<script>"}
    assert "<script>" not in hostile._repr_html_()
