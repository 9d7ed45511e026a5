import numpy as np
import pytest
import torch
import xarray as xr
import zarr

import mi_pipe
from mi_pipe.attention.head_scores import HeadScores
from mi_pipe.core.errors import ConfigError, PromptError
from mi_pipe.core.stage import execute
from mi_pipe.core.store import Store
from stages import heads as stage
from stages.heads import STAGE, HeadsConfig, Inputs
from tests.stages.killed import resume_after_kill
from tests.stages.toys import toy_corpus, toy_model, toy_task

CONFIG = HeadsConfig(n_sequences=4, period=10, n_pattern_prompts=3, device="cpu", batch_tokens=40)


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    return Store(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def inputs(store) -> Inputs:
    model = toy_model(store)
    return Inputs(model=model, tasks=[toy_task(store, model), toy_task(store, model, seed=1)])


@pytest.fixture(scope="module")
def heads(store, inputs) -> HeadScores:
    found = mi_pipe.open(execute(STAGE, CONFIG, inputs, store).artifact.path)
    assert isinstance(found, HeadScores)
    return found


def test_the_table_has_every_head_and_top_sorts_it(heads):
    table = heads.scores()
    assert len(table) == 2 * 4
    assert heads.score_names[:3] == ["previous_token", "duplicate_token", "induction"]
    assert str(table["induction"].dtype) == "float32"
    top = heads.top("induction", 3)
    assert top["induction"].is_monotonic_decreasing
    assert top["name"][0] == heads.summary["induction_head"]
    assert heads.grid("induction").sizes == {"layer": 2, "head": 4}
    with pytest.raises(ConfigError, match="Did you mean 'induction'"):
        heads.top("inductoin")


def test_patterns_of_clean_prompts_equal_the_bridges(heads, inputs):
    assert heads.tasks == ["induction", "induction-2"]
    pattern = heads.pattern("induction")
    assert pattern.dims == ("prompt", "layer", "head", "query", "key")
    assert pattern.dtype == np.float16
    task = inputs.tasks[0]
    assert pattern["prompt"].to_numpy().tolist() == [0, 2, 4], "clean prompts are the even ones"
    bridge = inputs.model.load("cpu").bridge
    for i, prompt in enumerate([0, 2, 4]):
        tokens = task.prompt(prompt)
        _, cache = bridge.run_with_cache(torch.from_numpy(tokens.astype(np.int64))[None])
        for layer in range(2):
            wanted = cache[f"blocks.{layer}.attn.hook_pattern"][0].numpy().astype(np.float16)
            found = pattern[i, layer].to_numpy()
            np.testing.assert_array_equal(found[:, : len(tokens), : len(tokens)], wanted)
            assert np.isnan(found[:, len(tokens) :]).all()
            assert np.isnan(found[:, :, len(tokens) :]).all()
        assert pattern.attrs["labels"][i] == task.texts(prompt)
    with pytest.raises(ConfigError, match="no patterns of task 'ioi'"):
        heads.pattern("ioi")


def test_patterns_open_with_plain_zarr_and_xarray(heads):
    path = heads.path / "patterns" / "induction.zarr"
    group = zarr.open_group(path, mode="r")
    assert group["pattern"].metadata.dimension_names == ("prompt", "layer", "head", "query", "key")
    plain = xr.open_zarr(path, consolidated=False)
    assert plain["token_id"].dtype == np.int32
    assert int((plain["token_id"] == -1).sum()) == 4, "two of three prompts are two tokens shorter"


def test_loss_says_how_it_was_measured(heads):
    assert heads.loss.keys() == {"first_half", "second_half", "n_sequences", "period"}
    assert heads.loss["period"] == 10
    assert heads.summary["second_half_loss"] == heads.loss["second_half"]


def test_the_period_shrinks_to_the_context_of_a_toy(store, inputs):
    short = toy_model(store, n_ctx=16)
    found = HeadScores(execute(STAGE, CONFIG, Inputs(model=short, tasks=[]), store).artifact.path)
    assert found.loss["period"] == 8
    assert found.tasks == []


def test_a_corpus_is_refused(store, inputs):
    corpus = toy_corpus(store, inputs.model)
    with pytest.raises(PromptError, match="without clean and corrupted pairs"):
        execute(STAGE, CONFIG, Inputs(model=inputs.model, tasks=[corpus]), store)


def test_prompts_longer_than_the_context_are_refused(store, inputs):
    with pytest.raises(PromptError, match="the model's context is 4"):
        execute(STAGE, CONFIG, Inputs(model=toy_model(store, n_ctx=4), tasks=inputs.tasks), store)


def test_killed_heads_continue_and_end_with_the_same_bytes(tmp_path, heads, inputs):
    result = resume_after_kill(stage, CONFIG, inputs, Store(tmp_path / "other"), at=4)
    assert result.artifact.digest == heads.digest
