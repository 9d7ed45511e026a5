import numpy as np
import pytest
import xarray as xr
import zarr

import mi_pipe
from mi_pipe.core.errors import ConfigError, PromptError, StageError
from mi_pipe.core.stage import execute
from mi_pipe.core.store import Store
from mi_pipe.patching.effects import PatchEffects
from stages import patch as stage
from stages.patch import STAGE, Inputs, PatchConfig
from tests.patching import apart
from tests.patching.pairs import brute_force
from tests.stages.killed import resume_after_kill
from tests.stages.scored_toy import toy_saes
from tests.stages.toys import toy_corpus, toy_model, toy_task

CONFIG = PatchConfig(max_pairs=5, device="cpu", batch_tokens=64)


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    return Store(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def inputs(store) -> Inputs:
    model = toy_model(store)
    return Inputs(model=model, task=toy_task(store, model))


@pytest.fixture(scope="module")
def effects(store, inputs) -> PatchEffects:
    found = mi_pipe.open(execute(STAGE, CONFIG, inputs, store).artifact.path)
    assert isinstance(found, PatchEffects)
    return found


def test_effects_equal_brute_force_and_unmeasured_cells_are_nan(effects, inputs):
    model = inputs.model.load("cpu")
    dataset = effects.to_xarray()
    assert effects.units == ["resid_pre", "attn_out", "head_out"]
    assert "mlp_out" not in dataset
    assert sorted(effects.pairs["pair"]) == [0, 1, 2, 3, 4]
    assert len(effects.lengths) == 2, "pairs of two lengths"
    for group in inputs.task.pair_groups():
        rows = np.flatnonzero(np.isin(group.pairs, effects.pairs["pair"]))
        for unit in effects.units:
            wanted = brute_force(model, group, unit)[rows]
            found = dataset[unit].sel(pair=group.pairs[rows]).to_numpy()
            n = wanted.shape[-1]
            np.testing.assert_allclose(found[:, :, :n], wanted, rtol=1e-5, atol=1e-5)
            assert np.isnan(found[:, :, n:]).all()


def test_recovered_is_the_ratio_of_means_over_the_pairs_that_have_the_cell(effects):
    dataset = effects.to_xarray()
    values = dataset["resid_pre"].to_numpy()
    last = values.shape[2] - 1
    have = ~np.isnan(values[:, 0, last])
    assert 0 < have.sum() < len(have)
    clean, corrupted = dataset["clean"].to_numpy()[have].mean(), dataset["corrupted"].to_numpy()[have].mean()
    wanted = (values[have, 1, last].mean() - corrupted) / (clean - corrupted)
    found = effects.recovered("resid_pre")
    assert found.dims == ("layer", "pos")
    assert float(found[1, last]) == pytest.approx(float(wanted), rel=1e-5)
    one_length = effects.recovered("resid_pre", n_pos=effects.lengths[0])
    assert one_length.sizes["pos"] == effects.lengths[0] == len(effects.labels(effects.lengths[0]))
    assert effects.recovered("head_out").dims == ("layer", "head")


def test_the_store_opens_with_plain_zarr_and_xarray(effects):
    group = zarr.open_group(effects.path / "effects.zarr", mode="r")
    assert group["resid_pre"].metadata.dimension_names == ("pair", "layer", "pos")
    assert group["head_out"].metadata.dimension_names == ("pair", "layer", "head")
    plain = xr.open_zarr(effects.path / "effects.zarr", consolidated=False)
    assert plain.attrs["direction"] == "denoising"
    assert plain.attrs["base_run"] == "corrupted"
    assert plain.attrs["metric"] == "logit_diff"
    assert plain["token_id"].dtype == np.int32
    for pair, labels in zip(effects.pairs["pair"], effects.pairs["labels"], strict=True):
        assert "".join(plain["token"].sel(pair=pair).to_numpy()) == "".join(labels)
    by_pos = effects.to_pandas("resid_pre")
    assert list(by_pos.columns) == ["pair", "layer", "pos", "token", "value"]
    assert (by_pos["token"] != "").all()
    frame = effects.to_pandas("head_out")
    assert list(frame.columns) == ["pair", "layer", "head", "value"]
    assert len(frame) == 5 * 2 * 4


def test_the_summary_names_engine_and_error(effects):
    assert effects.summary["engine"] == "RestartEngine"
    assert 0 <= effects.summary["engine_error"] < 1e-5
    assert effects.summary["n_pairs"] == 5


def test_noising_starts_from_the_clean_run(store, inputs):
    config = CONFIG.model_copy(update={"direction": "noising", "units": ["attn_out"]})
    found = PatchEffects(execute(STAGE, config, inputs, store).artifact.path)
    assert found.units == ["attn_out"]
    model, group = inputs.model.load("cpu"), inputs.task.pair_groups()[0]
    rows = np.flatnonzero(np.isin(group.pairs, found.pairs["pair"]))
    values = found.effects("attn_out", group.n_pos).to_numpy()
    np.testing.assert_allclose(values, brute_force(model, group, "attn_out", "noising")[rows], rtol=1e-5, atol=1e-5)


def test_a_unit_that_was_not_patched_is_answered_with_those_that_were(effects):
    with pytest.raises(ConfigError, match=r"no unit 'resid_pr'\. Did you mean 'resid_pre'"):
        effects.effects("resid_pr")
    with pytest.raises(ConfigError, match="no pair of 99 tokens"):
        effects.recovered("resid_pre", n_pos=99)


def test_a_corpus_is_refused_before_the_model_loads(store, inputs):
    with pytest.raises(PromptError, match="without clean and corrupted pairs"):
        execute(STAGE, CONFIG, Inputs(model=inputs.model, task=toy_corpus(store, inputs.model)), store)


def test_prompts_of_another_models_tokenizer_are_refused(store, inputs):
    small = toy_model(store, d_vocab=8)
    with pytest.raises(PromptError, match="another model's tokenizer"):
        execute(STAGE, CONFIG, Inputs(model=small, task=inputs.task), store)


def test_prompts_longer_than_the_context_are_refused(store, inputs):
    short = toy_model(store, n_ctx=4)
    with pytest.raises(PromptError, match="the model's context is 4"):
        execute(STAGE, CONFIG, Inputs(model=short, task=inputs.task), store)


def test_a_killed_sweep_continues_and_ends_with_the_same_bytes(tmp_path, effects, inputs):
    result = resume_after_kill(stage, CONFIG, inputs, Store(tmp_path / "other"), at=5)
    assert result.artifact.digest == effects.digest
    assert result.artifact.manifest.files.keys() == effects.manifest.files.keys()


def test_runs_that_do_not_differ_have_no_fraction_and_no_strongest_head(store, inputs):
    config = CONFIG.model_copy(update={"metric": "tests.stages.own_metric:one", "units": ["head_out"]})
    found = PatchEffects(execute(STAGE, config, inputs, store).artifact.path)
    assert bool(found.recovered("head_out").isnull().all())
    assert bool((found.statistics("head_out")["p"] == 1).all())
    assert "strongest_head" not in found.summary


def test_a_metric_that_is_no_number_stops_the_sweep_in_one_sentence(store, inputs):
    config = CONFIG.model_copy(update={"metric": "tests.stages.own_metric:not_a_number"})
    with pytest.raises(StageError, match="not_a_number of unpatched runs is not a finite number"):
        execute(STAGE, config, inputs, store)


def test_pairs_without_others_to_draw_from_are_told_in_the_log(store, inputs, caplog):
    config = CONFIG.model_copy(update={"intervention": "resample", "units": ["attn_out"], "max_pairs": 3})
    made = execute(STAGE, config, inputs, store).artifact
    assert "alone" not in caplog.text, "pairs that are not swept are drawn from"
    assert PatchEffects(made.path).to_xarray().attrs["donor_pairs"] == 7
    few = Inputs(model=inputs.model, task=toy_task(store, inputs.model, n_pairs=3))
    execute(STAGE, config, few, store)
    assert "1 of 3 pairs are alone of their length, and get their own donor's values" in caplog.text


@pytest.fixture(scope="module")
def with_mlps(store) -> Inputs:
    model = toy_model(store, attn_only=False)
    hooks = ("blocks.0.hook_resid_post", "blocks.1.hook_mlp_out")
    return Inputs(model, toy_task(store, model), toy_saes(store, "7" * 16, hooks, 32))


SAE_CONFIG = CONFIG.model_copy(update={"units": ["neuron", "sae_feature", "sae_error"], "neurons": 3, "features": 4})


def test_parts_of_saes_are_measured_where_there_is_one_and_nan_elsewhere(store, with_mlps):
    config = SAE_CONFIG.model_copy(update={"saes": ["blocks.1.hook_mlp_out"], "features": [5, 0]})
    found = PatchEffects(execute(STAGE, config, with_mlps, store).artifact.path)
    model, sae = with_mlps.model.load("cpu"), with_mlps.saes["second.topk"]
    dataset = found.to_xarray()
    assert dataset["feature_id"].to_numpy().tolist() == [[-1, -1], [5, 0]]
    assert dataset.attrs["saes"] == ["", "second.topk"]
    assert dataset.attrs["sae_hooks"] == ["", "blocks.1.hook_mlp_out"]
    assert dataset.attrs["sae_set"] == with_mlps.saes.id
    assert found.effects("sae_error").dims == ("pair", "layer")
    assert bool(found.effects("sae_feature").isel(layer=0).isnull().all())
    for group in with_mlps.task.pair_groups():
        rows = np.flatnonzero(np.isin(group.pairs, found.pairs["pair"]))
        for unit in ("sae_feature", "sae_error"):
            wanted = apart.brute_force(model, group, sae, "denoising", unit, [5, 0])[rows]
            values = found.effects(unit, group.n_pos).to_numpy()[:, 1]
            np.testing.assert_allclose(values, wanted.reshape(values.shape), rtol=1e-5, atol=3e-5)
    frame = found.to_pandas("sae_feature")
    assert list(frame.columns) == ["pair", "layer", "feature", "feature_id", "value"]
    assert len(frame) == 5 * 2
    assert set(found.to_pandas("neuron")["neuron_id"]) == set(dataset["neuron_id"].to_numpy().ravel())
    assert "p" in found.statistics("sae_feature")


def test_saes_that_cannot_be_patched_are_told_before_the_model_loads(store, inputs, with_mlps):
    for changes, given, message in [
        ({}, Inputs(inputs.model, inputs.task), "sae_feature, sae_error need SAEs, and none were given"),
        ({}, with_mlps, "first.topk and first.threshold are both of layer 0"),
        ({"saes": ["second.topk"], "features": [10_000]}, with_mlps, "second.topk has features 0 to"),
    ]:
        with pytest.raises(ConfigError, match=message):
            execute(STAGE, SAE_CONFIG.model_copy(update=changes), given, store)
