import numpy as np
import pytest
import torch
import xarray as xr

import mi_pipe
from mi_pipe.core.errors import ConfigError, HookPointError
from mi_pipe.core.stage import execute
from mi_pipe.core.store import Store
from mi_pipe.lenses.lens_readings import LensReadings
from stages import lenses as stage
from stages.lenses import STAGE, Inputs
from tests.lenses.toy import LAST, lens_config, lens_inputs
from tests.stages.killed import resume_after_kill
from tests.stages.toys import LENGTHS


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    return Store(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def inputs(store) -> Inputs:
    return lens_inputs(store)


@pytest.fixture(scope="module")
def readings(store, inputs) -> LensReadings:
    found = mi_pipe.open(execute(STAGE, lens_config(), inputs, store).artifact.path)
    assert isinstance(found, LensReadings)
    return found


def runs_of_the_bridge(inputs):
    """Yield pair group, logits and cache of TransformerLens' own run of the toy."""
    model = inputs.model.load("cpu")
    for group in inputs.tasks[0].pair_groups():
        logits, cache = model.bridge.run_with_cache(group.clean)
        yield group, logits, cache, model


def test_the_logit_lens_is_final_norm_and_unembedding_of_the_bridge_s_residuals(readings, inputs):
    data = readings.to_xarray("induction")
    prompts = inputs.tasks[0].prompts
    n_seen = 0
    for group, logits, cache, model in runs_of_the_bridge(inputs):
        final = logits.log_softmax(-1)
        for row, pair in enumerate(group.pairs):
            is_it = (prompts["pair"] == pair) & (prompts["role"] == "clean")
            prompt = int(prompts.loc[is_it, "prompt_idx"].iloc[0])
            if prompt not in data["prompt"].to_numpy():
                continue
            n_seen += 1
            for depth in range(3):
                name = f"blocks.{depth - 1}.hook_resid_post" if depth else "blocks.0.hook_resid_pre"
                lens = model.bridge.unembed(model.bridge.ln_final(cache[name][row])).log_softmax(-1)
                found = data.sel(lens="logit", prompt=prompt, depth=depth).isel(pos=slice(group.n_pos))
                kl = (final[row].exp() * (final[row] - lens)).sum(-1)
                np.testing.assert_allclose(found["kl"], kl, atol=2e-5)
                np.testing.assert_allclose(found["entropy"], -(lens.exp() * lens).sum(-1), rtol=1e-4)
                right = torch.cat([group.clean[row, 1:], group.answer[row : row + 1]])
                log_prob = lens.gather(1, right[:, None])[:, 0]
                np.testing.assert_allclose(found["log_prob"].sel(choice="next"), log_prob, rtol=1e-4, atol=1e-4)
                ranks = (lens > lens.gather(1, right[:, None])).sum(1)
                np.testing.assert_array_equal(found["rank"].sel(choice="next"), ranks)
                np.testing.assert_array_equal(found["top_id"], lens.topk(3).indices)
    assert n_seen == 5


def test_the_lens_of_the_last_depth_is_the_model(readings):
    last = readings.to_xarray("induction").sel(lens="logit", depth=2)
    assert float(np.nanmax(np.abs(last["kl"]))) < 1e-6
    assert int(last["hook"].size) == 1
    assert str(last["hook"].item()) == LAST


def test_positions_beyond_a_prompt_and_depths_without_a_translator_are_missing(readings):
    data = readings.to_xarray("induction")
    short = data["token_id"].to_numpy()[:, LENGTHS[0]] < 0
    assert 0 < short.sum() < len(short)
    assert np.isnan(data["kl"].to_numpy()[:, short, :, LENGTHS[0] :]).all()
    assert (data["top_id"].to_numpy()[:, short, :, LENGTHS[0] :] == -1).all()
    assert np.isnan(data["kl"].sel(lens="tuned", depth=2)).all()
    assert not np.isnan(data["kl"].sel(lens="tuned", depth=1).isel(pos=0)).any()


def test_the_tuned_lens_is_better_than_the_logit_lens_on_held_out_rows(readings):
    table = readings.evaluation.set_index(["lens", "depth"])
    for depth in (0, 1):
        assert table.loc[("tuned", depth), "kl"] < 0.9 * table.loc[("logit", depth), "kl"]
        assert table.loc[("tuned", depth), "kl_high"] < table.loc[("logit", depth), "kl_low"]
    model = table.loc[("model", -1)]
    assert model["kl"] == 0
    assert model["top_agreement"] == 1
    assert np.isfinite(model["cross_entropy"])
    history = readings.training.set_index(["depth", "step"])["validation_kl"]
    assert history[0, 30] < history[0, 0]


def test_the_first_validation_is_the_logit_lens_itself(store, inputs, readings):
    final = inputs.model.load("cpu")
    acts = inputs.activations
    held = acts.held_out_prompts(0.35, 0) & ~acts.held_out_prompts(0.2, 0)
    rows = np.flatnonzero(held[acts.prompt_idx] & ~acts.massive(LAST) & ~acts.massive("blocks.0.hook_resid_post"))
    rows = rows[~acts.massive("blocks.0.hook_resid_pre")[rows]]

    def log_probs(hook):
        return final.unembedding(final.final_norm(torch.from_numpy(acts.take(hook, rows)))).log_softmax(-1)

    p, q = log_probs(LAST), log_probs("blocks.0.hook_resid_post")
    wanted = float((p.exp() * (p - q)).sum(-1).mean())
    history = readings.training.set_index(["depth", "step"])["validation_kl"]
    assert history[1, 0] == pytest.approx(wanted, rel=1e-4)


def test_final_logits_come_from_a_run_where_the_store_lacks_the_last_layer(tmp_path, readings):
    other = Store(tmp_path / "other")
    found = LensReadings(execute(STAGE, lens_config(), lens_inputs(other, with_last=False), other).artifact.path)
    mine, theirs = (item.evaluation.set_index(["lens", "depth"])["kl"] for item in (found, readings))
    np.testing.assert_allclose(mine, theirs, rtol=0.02, atol=1e-6)


def test_readers_speak_in_tokens_and_translators_make_the_stored_readings(readings, inputs):
    prompt = int(readings.to_xarray("induction")["prompt"][0])
    labels = readings.labels("induction", prompt)
    assert labels == inputs.tasks[0].texts(prompt)
    top = readings.top("induction", prompt, "tuned")
    assert top.shape == (3, len(labels))
    assert readings.hooks == ["blocks.0.hook_resid_pre", "blocks.0.hook_resid_post"]
    model = inputs.model.load("cpu")
    tokens = torch.from_numpy(inputs.tasks[0].prompt(prompt).astype(np.int64))[None]
    _, cache = model.bridge.run_with_cache(tokens)
    translated = readings.translator("blocks.1.hook_resid_pre")(cache["blocks.0.hook_resid_post"])
    lens = model.bridge.unembed(model.bridge.ln_final(translated)).log_softmax(-1)[0]
    frame = readings.to_pandas("induction", "tuned").query("prompt == @prompt and depth == 1")
    np.testing.assert_allclose(frame["entropy"], -(lens.exp() * lens).sum(-1), rtol=1e-4)
    assert top.loc[1, 0] == model.vocabulary.text(int(lens[0].argmax()))
    second = readings.top("induction", prompt, "tuned", rank=1)
    assert second.loc[1, 0] == model.vocabulary.text(int(lens[0].topk(2).indices[1]))
    with pytest.raises(ConfigError, match="has the 3 likeliest tokens, ranks from 0, not rank 3"):
        readings.top("induction", prompt, rank=3)


def test_arrays_open_with_plain_xarray(readings):
    plain = xr.open_zarr(readings.path / "tasks" / "induction.zarr", consolidated=False)
    assert plain["log_prob"].dims == ("lens", "prompt", "depth", "pos", "choice")
    assert plain["log_prob"].dtype == np.float32
    assert list(plain["lens"].values) == ["logit", "tuned"]


def test_without_tuning_there_is_only_the_logit_lens(store, inputs):
    config = lens_config(tuned=None)
    alone = LensReadings(execute(STAGE, config, Inputs(inputs.model, inputs.tasks), store).artifact.path)
    assert list(alone.to_xarray("induction")["lens"].values) == ["logit"]
    assert not alone.is_tuned
    with pytest.raises(ConfigError, match=r"no translator of 'blocks.0.hook_resid_post'"):
        alone.translator("blocks.0.hook_resid_post")
    with pytest.raises(ConfigError, match=r"no lens 'tuned' of induction; it has logit"):
        alone.top("induction", 0, "tuned")


def test_what_cannot_be_trained_on_is_one_sentence(store, inputs):
    with pytest.raises(ConfigError, match="trained on activations"):
        execute(STAGE, lens_config(), Inputs(inputs.model, inputs.tasks), store)
    all_of_it = lens_config(tuned={"validation_fraction": 0.6, "held_out_fraction": 0.6})
    with pytest.raises(ConfigError, match="leave no prompts to train on"):
        execute(STAGE, all_of_it, inputs, store)
    from tests.activations.harvests import harvest_toy

    heads = harvest_toy(store, [6, 8], hooks=["blocks.1.attn.hook_z"])
    with pytest.raises(HookPointError, match="none is of the residual stream"):
        execute(STAGE, lens_config(), Inputs(inputs.model, [], heads), store)


@pytest.mark.parametrize("at", [3, 6])
def test_a_killed_stage_continues_and_ends_with_the_same_bytes(tmp_path, readings, inputs, at):
    result = resume_after_kill(stage, lens_config(), inputs, Store(tmp_path / "other"), at=at)
    assert result.artifact.digest == readings.digest
