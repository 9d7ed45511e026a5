"""The stage `steer`: stored values, texts, kill and resume, and what is refused."""

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from pydantic import ValidationError

import mi_pipe
from mi_pipe.core.errors import ConfigError, HookPointError, PromptError
from mi_pipe.core.stage import execute, stage_id
from mi_pipe.core.store import Store
from mi_pipe.models.trained import TrainedModel
from mi_pipe.patching.metrics import find_metric
from mi_pipe.prompts.prompt_set import PromptSet
from mi_pipe.steering.contrast import from_contrast
from mi_pipe.steering.direction import random_like
from mi_pipe.steering.measuring import metric_values, text_losses
from mi_pipe.steering.steering import Steering
from mi_pipe.steering.texts import Writing, steered_texts
from stages import steer as stage
from stages.steer import STAGE, Inputs, SteeringConfig
from tests.stages.killed import resume_after_kill
from tests.stages.toys import toy_corpus, toy_model, toy_task

HOOK = "blocks.0.hook_resid_post"
SIDES = {"prompts": "ioi", "positive": "role == 'clean'", "negative": "role == 'corrupted'"}
TEXTS = {"positive": ["5 6 7", "9 8"], "negative": ["30 31"], "position": "all"}
FIELDS = {
    "directions": {
        "clean": {"hook": HOOK, "contrast": SIDES},
        "texts": {"hook": "blocks.1.hook_resid_pre", "contrast": TEXTS, "scale": 2.5},
    },
    "coefficients": [1, -2],
    "perplexity": {"n_prompts": 5},
    "generation": {"n_tokens": 5, "n_prompts": 3},
    "device": "cpu",
    "batch_tokens": 40,
}


def config(**changes) -> SteeringConfig:
    return SteeringConfig(**{**FIELDS, **changes})


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    return Store(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def inputs(store) -> Inputs:
    model = TrainedModel(toy_model(store, attn_only=False).path)
    task = toy_task(store, model, places={"io": 1})
    return Inputs(model=model, tasks=[task], prompts=toy_task(store, model, n_pairs=9, seed=2), contrasts=[task])


@pytest.fixture(scope="module")
def found(store, inputs) -> Steering:
    artifact = mi_pipe.open(execute(STAGE, config(), inputs, store).artifact.path)
    assert isinstance(artifact, Steering)
    return artifact


def sides(task: PromptSet) -> list[list[np.ndarray]]:
    return [[task.prompt(i) for i in range(start, task.n_prompts, 2)] for start in (0, 1)]


def test_directions_are_those_of_the_library_and_have_controls(found, inputs):
    model = inputs.model.load("cpu")
    table = found.directions().set_index("direction")
    assert list(table.index) == ["clean", "texts", "clean~random0", "texts~random0"]
    expected = from_contrast(model, *sides(inputs.tasks[0]), HOOK)
    torch.testing.assert_close(found.direction("clean").unit, expected.unit)
    assert found.direction("clean").scale == pytest.approx(expected.scale)
    assert table.loc["texts", "scale"] == 2.5
    assert table.loc["texts", "layer"] == 1
    assert table.loc["texts~random0", "control_of"] == "texts"
    control = found.direction("texts~random0")
    assert torch.equal(control.unit, random_like(found.direction("texts"), 0).unit)
    with pytest.raises(ConfigError, match="no direction 'text'"):
        found.direction("text")


def test_stored_values_are_those_of_the_library_pair_by_pair(found, inputs):
    model = inputs.model.load("cpu")
    assert found.measures == ["ioi", "loss"]
    assert found.coefficients == [-2, 0, 1]
    stored = found.to_xarray("ioi")["metric"]
    assert stored.dims == ("direction", "coefficient", "pair")
    directions = [found.direction(name) for name in stored["direction"].values]
    for group in inputs.tasks[0].pair_groups():
        expected = metric_values(model, directions, [-2, 0, 1], group, find_metric("logit_diff"), False, 10_000)
        np.testing.assert_allclose(stored.sel(pair=group.pairs), expected, rtol=1e-3, atol=1e-3)
    losses = found.to_xarray("loss")
    assert losses["loss"].dims == ("direction", "coefficient", "prompt")
    for prompt in losses["prompt"].values:
        tokens = torch.from_numpy(inputs.prompts.prompt(int(prompt)).astype(np.int64))[None]
        expected = text_losses(model, directions, [-2, 0, 1], tokens, 10_000)[..., 0]
        np.testing.assert_allclose(losses["loss"].sel(prompt=prompt), expected, rtol=1e-4, atol=1e-4)
        assert int(losses["n_tokens"].sel(prompt=prompt)) == tokens.shape[1] - 1


def test_means_and_changes_are_of_prompts_and_of_tokens(found):
    effects = found.effects()
    stored = found.to_xarray("ioi")["metric"]
    row = effects.set_index(["measure", "direction", "coefficient"]).loc[("ioi", "clean", 1.0)]
    of_one = stored.sel(direction="clean", coefficient=1.0)
    assert row["mean"] == pytest.approx(float(of_one.mean()), rel=1e-5)
    change = float((of_one - stored.sel(direction="clean", coefficient=0.0)).mean())
    assert row["change"] == pytest.approx(change, rel=1e-4)
    assert row["change_low"] <= row["change"] <= row["change_high"]
    losses = found.to_xarray("loss")
    weighted = (losses["loss"] * losses["n_tokens"]).sum("prompt") / losses["n_tokens"].sum()
    loss = found.effects("loss").set_index(["direction", "coefficient"])
    assert loss.loc[("texts", -2.0), "mean"] == pytest.approx(float(weighted.sel(direction="texts", coefficient=-2.0)))
    still = effects[effects["coefficient"] == 0]
    assert (still[["change", "change_low", "change_high"]] == 0).all(axis=None)
    assert found.summary["perplexity"] == pytest.approx(np.exp(loss.loc[("texts", 0.0), "mean"]))
    with pytest.raises(ConfigError, match="has not measured 'facts'"):
        found.effects("facts")


def test_texts_are_those_of_the_library(found, inputs):
    model = inputs.model.load("cpu")
    texts = found.generations("clean")
    assert set(texts["direction"]) == {"", "clean"}
    assert len(texts) == 3 * 3 * 2
    clean, _ = sides(inputs.tasks[0])
    beginnings = [prompt for prompt in clean if len(prompt) == 6][:3]
    assert texts["prompt_text"].iloc[0] == "".join(f" {token}" for token in beginnings[0])
    writing = Writing(n_tokens=5, n_samples=1, batch_tokens=10_000)
    expected = steered_texts(model, found.direction("clean"), found.coefficients, beginnings, writing)
    same = texts.sort_values(["coefficient", "prompt", "sample"], ignore_index=True)
    assert same["text"].tolist() == expected["text"].tolist()
    assert len(found.greedy()) == 3 * 5


def test_arrays_open_with_plain_xarray_and_say_how_they_were_made(found, inputs):
    dataset = xr.open_zarr(found.path / "metric" / "ioi.zarr", consolidated=False)
    assert dataset.attrs["metric"] == "logit_diff"
    assert dataset.attrs["directions"][0] == "clean"
    assert dataset.attrs["task"] == inputs.tasks[0].id
    assert dataset["metric"].dtype == np.float32
    assert list(dataset["coefficient"].values) == [-2, 0, 1]


def test_a_killed_run_continues_to_the_same_bytes(inputs, found, tmp_path):
    resumed = resume_after_kill(stage, config(), inputs, Store(tmp_path / "other"), at=5).artifact
    assert resumed.id == found.id
    assert resumed.digest == found.digest


def test_batches_do_not_change_the_result_or_its_id(inputs, found, tmp_path):
    other = config(batch_tokens=1000)
    refs = {"model": inputs.model.id, "tasks.0": inputs.tasks[0].id, "prompts": inputs.prompts.id}
    refs["contrasts.0"] = inputs.contrasts[0].id
    assert stage_id(STAGE, other, refs) == found.id
    again = Steering(execute(STAGE, other, inputs, Store(tmp_path / "other")).artifact.path)
    for measure in found.measures:
        xr.testing.assert_allclose(again.to_xarray(measure), found.to_xarray(measure), rtol=1e-3, atol=1e-3)
    pd.testing.assert_frame_equal(again.generations(), found.generations())


def test_text_of_contrasts_is_held_out_of_the_loss(store, inputs):
    corpus = toy_corpus(store, inputs.model)
    direction = {
        "hook": HOOK,
        "contrast": {**SIDES, "prompts": "prompts", "positive": "pair == 0", "negative": "pair == 1"},
    }
    chosen = config(directions={"a": direction}, perplexity={"n_prompts": 100}, generation=None)
    text = inputs.prompts
    result = Steering(execute(STAGE, chosen, Inputs(inputs.model, [], text, [text]), store).artifact.path)
    assert sorted(result.to_xarray("loss")["prompt"].values) == list(range(4, 18))
    assert result.measures == ["loss"]
    assert result.generations().empty
    sources = {"prompts": "prompts", "positive": "prompt_idx == 0", "negative": "prompt_idx == 1"}
    both = config(directions={"a": {"hook": HOOK, "contrast": sources}})
    with pytest.raises(PromptError, match="contrasts use them all"):
        STAGE.estimate(both, Inputs(inputs.model, [], corpus, [corpus]))


def test_a_metric_of_ones_own_counts_with_its_source():
    assert config(metric="tests.stages.own_metric:first_logit").identity()["metric_source"]
    assert "metric_source" not in config().identity()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"metric": "logit_dif"}, ConfigError, "logit_diff"),
        ({"directions": {"a": {"hook": "blocks.7.hook_resid_post", "contrast": TEXTS}}}, HookPointError, "layers 0"),
        ({"directions": {"a": {"hook": "blocks.0.attn.hook_pattern", "contrast": TEXTS}}}, HookPointError, "steered"),
        ({"directions": {"a": {"hook": HOOK, "contrast": {**SIDES, "positive": "rol == 'x'"}}}}, ConfigError, "'rol'"),
        ({"directions": {"a": {"hook": HOOK, "contrast": {**SIDES, "positive": "pair > 99"}}}}, PromptError, "No p"),
        ({"directions": {"a": {"hook": HOOK, "probe": {"label": "x"}}}}, ConfigError, "no probes"),
        ({"directions": {"a": {"feature": {"sae": "s", "index": 1}}}}, ConfigError, "no SAEs"),
        ({"generation": {"n_tokens": 60}}, PromptError, "context of 64"),
        ({"generation": {"prompts": ["Once upon"]}}, PromptError, "reads numbers"),
    ],
)  # fmt: skip
def test_mistakes_are_told_before_the_model_runs(inputs, changes, error, message):
    chosen = config(**changes)
    some = Inputs(inputs.model, inputs.tasks, inputs.prompts, inputs.contrasts if chosen.contrast_sets else [])
    with pytest.raises(error, match=message):
        STAGE.estimate(chosen, some)


@pytest.mark.parametrize(
    ("direction", "message"),
    [
        ({"hook": HOOK}, "just one|one of contrast, probe and feature, not none"),
        ({"contrast": TEXTS}, "needs its hook point"),
        ({"hook": HOOK, "contrast": {**SIDES, "negative": ["5"]}}, "both lists of texts, or both conditions"),
        ({"hook": HOOK, "contrast": {**TEXTS, "prompts": "ioi"}}, "conditions need"),
        ({"hook": HOOK, "contrast": TEXTS, "scale": -1}, "scale"),
    ],
)
def test_configs_that_contradict_themselves_are_refused(direction, message):
    with pytest.raises(ValidationError, match=message):
        config(directions={"a": direction})
