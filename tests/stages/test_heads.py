import numpy as np
import pytest
import torch
import xarray as xr
import zarr

import mi_pipe
from mi_pipe.attention.head_scores import HeadScores
from mi_pipe.core.errors import ConfigError, PromptError, StageError
from mi_pipe.core.stage import execute
from mi_pipe.core.store import Store
from mi_pipe.heads.classes import Thresholds
from mi_pipe.heads.composition import composition
from mi_pipe.heads.direct_logit_attribution import direct_logit_attribution
from mi_pipe.heads.prompt_attention import measure_attention, named_positions
from mi_pipe.models.head_weights import head_weights
from stages import heads as stage
from stages import heads_units
from stages.heads import STAGE, HeadsConfig, Inputs
from tests.stages.killed import resume_after_kill
from tests.stages.toys import toy_corpus, toy_model, toy_task

CONFIG = HeadsConfig(n_sequences=4, period=10, prefix_period=5, n_pattern_prompts=3, device="cpu", batch_tokens=40)
PLACES = {"io": 1, "s1": 2, "s2": 4, "end": -1}
# A random toy does nothing well: thresholds low enough that there are name movers to steer.
NAMED = CONFIG.model_copy(
    update={"thresholds": Thresholds(prompts=0.05, subject=0.05, logit_share=0.001, copying=0.01), "name_pairs": 4}
)


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


@pytest.fixture(scope="module")
def named(store, inputs) -> HeadScores:
    task = toy_task(store, inputs.model, places=PLACES)
    found = mi_pipe.open(execute(STAGE, NAMED, Inputs(model=inputs.model, tasks=[task]), store).artifact.path)
    assert isinstance(found, HeadScores)
    return found


@pytest.fixture(scope="module")
def named_task(store, inputs):
    return toy_task(store, inputs.model, places=PLACES)


def test_composition_is_read_by_kind_and_pair(heads, inputs):
    found, model = heads.composition(), inputs.model.load("cpu")
    assert found.dims == ("kind", "layer", "head", "later_layer", "later_head")
    weights = [head_weights(model, layer) for layer in range(2)]
    for kind in "qkv":
        np.testing.assert_array_equal(found.sel(kind=kind).to_numpy(), composition(weights, kind).numpy())
    assert np.isnan(found.sel(layer=1)).all()
    above = heads.composition(above_random=True)
    assert float(above.mean()) == pytest.approx(float(found.mean()) - found.attrs["random_mean"], abs=1e-6)


def test_attribution_and_attention_are_in_the_order_of_the_pairs(named, named_task, inputs):
    model = inputs.model.load("cpu")
    attribution, attention = named.attribution("ioi"), named.attention("ioi")
    assert attention["places"].dims == ("pair", "layer", "head", "from", "to")
    assert list(attention["to"].to_numpy()) == ["io", "s1", "s1+1", "s2", "end"]
    for group in named_task.pair_groups():
        of_group = attribution.sel(pair=group.pairs)
        expected = direct_logit_attribution(model, group.clean, group.answer, group.wrong)
        np.testing.assert_allclose(of_group["heads"], expected.heads, atol=1e-5)
        np.testing.assert_allclose(of_group["logit_diff"], expected.logit_diff, atol=1e-5)
        places = np.stack(list(named_positions(group.places, group.n_pos).values()), 1)
        measured = measure_attention(model, group.clean, places)
        np.testing.assert_allclose(attention["places"].sel(pair=group.pairs), measured.places, atol=1e-6)
        np.testing.assert_allclose(attention["habits"].sel(pair=group.pairs), measured.habits, atol=1e-5)


def test_stored_contributions_sum_to_the_logit_difference(named):
    found = named.attribution("ioi")
    by_layer = found["heads"].sum("head") + found["attn_bias"] + found["mlps"]
    total = by_layer.sum("layer") + found["embed"] + found["pos_embed"] + found["bias"]
    np.testing.assert_allclose(total, found["logit_diff"], atol=1e-4)


def test_classes_show_their_evidence(named):
    classes = named.classes()
    assert len(classes) == 2 * 4
    attended = named.attention("ioi")["places"].sel({"from": "end", "to": "io"}).mean("pair")
    np.testing.assert_allclose(classes["end_to_io"], attended.to_numpy().ravel(), atol=1e-6)
    attribution = named.attribution("ioi")
    share = attribution["heads"].mean("pair") / abs(float(attribution["logit_diff"].mean()))
    np.testing.assert_allclose(classes["logit_share"], share.to_numpy().ravel(), atol=1e-5)
    movers = named.classes("name_mover")
    assert len(movers) > 0
    assert (movers["logit_share"] >= 0.001).all()
    assert named.summary["name_mover_heads"] == ", ".join(f"{a}.{b}" for a, b in movers[["layer", "head"]].to_numpy())
    measured = classes["name_mover_attention_loss"].notna()
    assert measured.any(), "heads before the name movers were exchanged"
    assert (classes.loc[measured, "layer"] == 0).all()
    assert (classes.loc[measured, "end_to_s2"] >= 0.05).all()
    with pytest.raises(ConfigError, match="Did you mean 'name_mover'"):
        named.classes("name_movr")


def test_scores_have_copying_and_prefix_matching(heads, named):
    more = ["prefix_matching", "sequence_copying", "ov_eigenvalue_copying", "full_ov_eigenvalue_copying"]
    assert heads.score_names[5:] == more
    assert named.score_names[5:] == [*more, "name_copying", "negative_name_copying"]
    assert heads.grid("sequence_copying").sizes == {"layer": 2, "head": 4}


def test_a_task_without_names_has_attention_and_attribution(heads):
    assert heads.attended_tasks == heads.attributed_tasks == ["induction", "induction-2"]
    assert "places" not in heads.attention("induction")
    with pytest.raises(ConfigError, match="no attribution of task 'ioi'"):
        heads.attribution("ioi")


def test_a_task_whose_last_chunk_cannot_be_attributed_has_no_attribution(tmp_path, inputs, monkeypatch):
    calls = []

    def refuse_the_second(*given):
        calls.append(given)
        if len(calls) == 2:
            raise StageError("off by 2")
        return direct_logit_attribution(*given)

    monkeypatch.setattr(heads_units, "direct_logit_attribution", refuse_the_second)
    given = Inputs(model=inputs.model, tasks=inputs.tasks[:1])
    found = HeadScores(execute(STAGE, CONFIG, given, Store(tmp_path)).artifact.path)
    assert len(calls) == 2, "pairs of two lengths"
    assert found.attributed_tasks == []
    assert found.refused == {"attribution of induction": "off by 2"}
    assert found.attended_tasks == ["induction"]


def test_a_killed_last_unit_is_done_again(tmp_path, named, named_task, inputs, store):
    given = Inputs(model=inputs.model, tasks=[named_task])
    last = stage.estimate(NAMED, given).n_units - 1
    result = resume_after_kill(stage, NAMED, given, Store(tmp_path / "other"), at=last)
    assert result.artifact.digest == named.digest
