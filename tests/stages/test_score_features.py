import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

import mi_pipe
from mi_pipe.core.errors import ArtifactNotFoundError, ConfigError
from mi_pipe.core.progress import Progress
from mi_pipe.core.stage import execute
from mi_pipe.core.store import Store
from mi_pipe.features import latents
from mi_pipe.features.feature_set import FeatureSet
from mi_pipe.models.source import load_source
from mi_pipe.prompts.prompt_set import PromptSet
from mi_pipe.prompts.repeated import RepeatedConfig
from stages import generate_prompts, score_features
from stages.score_features import ScoreFeaturesConfig
from tests.stages.scored_toy import CONFIG, D_SAE, DEAD, HEADS, RESIDUAL, scored_inputs, small_units, toy_saes

FIRST = "first.topk"


@pytest.fixture(autouse=True)
def _small_units(monkeypatch):
    for name in ("BLOCK_ROWS", "MAX_FIRINGS"):
        monkeypatch.setattr(latents, name, getattr(latents, name))
    small_units()


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    store = Store(tmp_path_factory.mktemp("scored"))
    return store, scored_inputs(store)


@pytest.fixture(scope="module")
def scored(toy):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latents, "BLOCK_ROWS", 512)
        patch.setattr(latents, "MAX_FIRINGS", 3_000)
        store, inputs = toy
        return mi_pipe.open(execute(score_features.STAGE, CONFIG, inputs, store).artifact.path)


def dense_latents(inputs, name):
    """Encode all rows at once; massive rows are NaN."""
    sae = inputs.saes[name]
    store = inputs.activations
    latent = sae.encode(torch.from_numpy(store.read_rows(sae.hook, 0, store.n_rows))).numpy()
    latent[store.massive(sae.hook)] = np.nan
    return latent


def test_the_toy_has_what_makes_scoring_hard(toy, scored):
    """Several blocks and ranges, massive rows at one hook point at least, a dead feature."""
    _, inputs = toy
    assert len(latents.block_ranges(inputs.activations.n_rows)) > 2
    assert inputs.activations.massive(RESIDUAL).any() or inputs.activations.massive(HEADS).any()
    assert scored.features(FIRST)["is_dead"][DEAD]
    assert sum(path.endswith(".parquet") and FIRST in path for path in scored.manifest.files) > 2


@pytest.mark.parametrize("name", [FIRST, "first.threshold", "second.topk"])
def test_figures_are_those_of_the_dense_latents(toy, scored, name):
    latent = dense_latents(toy[1], name)
    kept = latent[~np.isnan(latent[:, 0])]
    frame = scored.features(name)
    assert frame["feature"].tolist() == list(range(D_SAE))
    np.testing.assert_array_equal(frame["n_firings"], (kept > 0).sum(0))
    np.testing.assert_allclose(frame["density"], (kept > 0).mean(0), rtol=1e-12)
    np.testing.assert_allclose(frame["max_activation"], kept.max(0), rtol=1e-5)
    np.testing.assert_array_equal(frame["is_dead"], ~(kept > 0).any(0))
    live = frame[~frame["is_dead"]]
    means = [kept[kept[:, i] > 0, i].mean() for i in live["feature"]]
    np.testing.assert_allclose(live["mean_activation"], means, rtol=1e-4)
    for feature in (0, DEAD, D_SAE - 1):
        histogram = scored.histogram(name, feature)
        assert histogram.counts.sum() == (kept[:, feature] > 0).sum()
    row = scored.saes.set_index("sae").loc[name]
    assert row["n_rows"] == len(kept)
    assert row["n_massive"] == len(latent) - len(kept)
    assert row["l0"] == pytest.approx((kept > 0).sum(1).mean())


@pytest.mark.parametrize("name", [FIRST, "second.topk"])
def test_examples_are_the_strongest_rows_in_their_context(toy, scored, name):
    inputs = toy[1]
    latent = dense_latents(inputs, name)
    table = inputs.activations.table(["row", "prompt_idx", "pos"])
    feature = int(scored.features(name)["density"].argmax())
    top = scored.examples(name, feature, "top")
    best = pd.Series(latent[:, feature]).groupby(table["prompt_idx"]).max().nlargest(CONFIG.n_top)
    np.testing.assert_allclose(top["activation"], best, rtol=1e-5)
    by_token = pd.Series(latent[:, feature], index=pd.MultiIndex.from_frame(table[["prompt_idx", "pos"]]))
    for example in scored.examples(name, feature).to_dict("records"):
        prompt = inputs.prompts.prompt(example["prompt_idx"])
        first = max(example["pos"] - CONFIG.context_before, 0)
        window = range(first, min(example["pos"] + CONFIG.context_after + 1, len(prompt)))
        assert example["first_pos"] == first
        assert example["token_ids"].tolist() == prompt[window].tolist()
        assert list(example["tokens"]) == [f" {token}" for token in prompt[window]]
        expected = by_token.reindex([(example["prompt_idx"], pos) for pos in window])
        np.testing.assert_allclose(example["activations"], expected, rtol=1e-4, atol=1e-5)
        assert example["activations"][example["pos"] - first] == np.float32(example["activation"])


def test_examples_of_every_group_are_within_their_quantile(toy, scored):
    latent = dense_latents(toy[1], FIRST)[:, 0]
    firing = np.sort(latent[latent > 0])
    median = firing[-(-len(firing) // 2)]
    assert (scored.examples(FIRST, 0, "q0")["activation"] <= median).all()
    assert (scored.examples(FIRST, 0, "q1")["activation"] >= median * (1 - 1e-5)).all()


def test_logit_effects_are_the_decoder_through_the_folded_norm(toy, scored):
    inputs = toy[1]
    model = load_source(inputs.model, "cpu")
    direction = inputs.saes[FIRST].W_dec[7]
    effect = ((direction - direction.mean()) * model.final_norm.weight) @ model.W_U
    found = scored.logit_effects(FIRST, 7)
    promoted = found[found["sign"] == "promoted"]
    np.testing.assert_allclose(promoted["effect"], effect.topk(CONFIG.n_logits).values, rtol=1e-3)
    assert promoted["token_id"].tolist() == effect.topk(CONFIG.n_logits).indices.tolist()
    suppressed = found[found["sign"] == "suppressed"]
    assert suppressed["token_id"].tolist() == effect.topk(CONFIG.n_logits, largest=False).indices.tolist()
    assert promoted["token"].tolist() == [f" {token}" for token in promoted["token_id"]]


def test_a_hook_point_outside_the_residual_stream_has_no_direct_effects(scored):
    assert scored.logit_effects("second.topk", 0).empty


def test_published_latents_are_every_firing(toy, scored):
    latent = dense_latents(toy[1], FIRST)[:, 3]
    found = scored.latents(FIRST, 3)
    assert found["row"].tolist() == np.flatnonzero(latent > 0).tolist()
    np.testing.assert_allclose(found["activation"], latent[latent > 0], rtol=1e-5)


def test_latents_that_are_not_kept_change_nothing_else(toy, scored):
    store, inputs = toy
    result = execute(score_features.STAGE, CONFIG.model_copy(update={"keep_latents": False}), inputs, store)
    found = mi_pipe.open(result.artifact.path)
    assert isinstance(found, FeatureSet)
    shared = {name: entry.checksum for name, entry in scored.manifest.files.items() if "latents/" not in name}
    assert {name: entry.checksum for name, entry in found.manifest.files.items()} == shared
    with pytest.raises(ArtifactNotFoundError, match="keep_latents=true"):
        found.latents(FIRST, 0)


def test_only_the_drawn_features_get_examples(toy, scored):
    store, inputs = toy
    config = CONFIG.model_copy(update={"n_example_features": 5, "keep_latents": False})
    found = mi_pipe.open(execute(score_features.STAGE, config, inputs, store).artifact.path)
    drawn = found.read_table("examples.parquet").groupby("sae")["feature"].unique()
    assert all(len(features) <= 5 for features in drawn)
    pd.testing.assert_frame_equal(found.features(), scored.features())
    feature = int(drawn[FIRST][0])
    pd.testing.assert_frame_equal(found.examples(FIRST, feature), scored.examples(FIRST, feature))


def test_the_same_config_is_cached_and_another_seed_is_another_artifact(toy, scored):
    store, inputs = toy
    assert execute(score_features.STAGE, CONFIG, inputs, store).outcome == "Cached"
    moved = CONFIG.model_copy(update={"device": "auto"})
    assert execute(score_features.STAGE, moved, inputs, store).outcome == "Cached"
    ids = {config.identity()["seed"] for config in (CONFIG, CONFIG.model_copy(update={"seed": 1}))}
    assert len(ids) == 2


def test_progress_ends_at_its_total(toy, tmp_path):
    _, inputs = toy
    ticks = []
    execute(score_features.STAGE, CONFIG, inputs, Store(tmp_path), Progress(ticks.append, every_s=0))
    assert ticks[-1].done == ticks[-1].total
    assert [tick.done for tick in ticks] == list(range(1, len(ticks) + 1))


@pytest.mark.parametrize("n_units", [5, 20, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 12, 32, 34, 35))])
def test_a_killed_run_continues_to_the_same_bytes(toy, scored, n_units):
    """Of the 35 units of the toy, 12 are encoded blocks, 20 ranges of features, 3 effects."""
    store, inputs = toy
    folder = store.root.parent / f"killed-{n_units}"
    shutil.copytree(store.root, folder, ignore=shutil.ignore_patterns("score_features", ".work"))
    command = [sys.executable, "-m", "tests.stages.scored_toy", str(folder), str(n_units)]
    killed = subprocess.run(command, capture_output=True, text=True, check=False)
    assert killed.returncode == -9, killed.stderr[-2000:]
    assert not list((folder / "score_features").glob("*/manifest.json"))
    result = execute(score_features.STAGE, CONFIG, inputs, Store(folder))
    assert result.outcome == "Resumed"
    assert result.artifact.digest == scored.digest
    assert result.artifact.summary == scored.summary


def test_the_artifact_says_what_it_is(scored):
    text = repr(scored)
    assert "first.threshold: 48 features on blocks.0.hook_resid_post" in text
    assert "dead" in text
    assert "<table" in scored._repr_html_()
    assert "«" in scored.text(FIRST, 0)


def test_an_unknown_sae_is_answered_with_near_names(scored):
    with pytest.raises(ArtifactNotFoundError, match=r"Did you mean 'first\.topk'"):
        scored.examples("first.topkk", 0)
    with pytest.raises(IndexError, match="features 0 to 47"):
        scored.histogram(FIRST, 48)


def test_an_sae_of_a_hook_point_that_is_not_stored_is_refused(toy):
    store, inputs = toy
    saes = toy_saes(store, "1" * 16, (RESIDUAL, "blocks.9.hook_resid_post"))
    with pytest.raises(ConfigError, match=r"second\.topk reads blocks\.9\.hook_resid_post, which .* does not hold"):
        execute(score_features.STAGE, CONFIG, replace(inputs, saes=saes), store)


def test_an_sae_of_another_width_is_refused(toy):
    store, inputs = toy
    saes = toy_saes(store, "2" * 16, d_in=16)
    with pytest.raises(ConfigError, match=r"width 16; .* has 32"):
        execute(score_features.STAGE, CONFIG, replace(inputs, saes=saes), store)


def test_prompts_that_were_not_harvested_are_refused(toy):
    store, inputs = toy
    config = RepeatedConfig(n_prompts=4, length=30, max_period=12)
    prompts = PromptSet(
        execute(generate_prompts.STAGE, config, generate_prompts.Inputs(inputs.model), store).artifact.path
    )
    with pytest.raises(ConfigError, match="were harvested on"):
        execute(score_features.STAGE, CONFIG, replace(inputs, prompts=prompts), store)


def test_a_device_that_is_not_there_is_refused_before_any_work(toy, tmp_path):
    _, inputs = toy
    with pytest.raises(ConfigError, match="not a device"):
        execute(score_features.STAGE, ScoreFeaturesConfig(n_top=7, device="abacus"), inputs, Store(tmp_path))
    assert not (tmp_path / ".work").exists()
