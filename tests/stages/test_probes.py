import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import r2_score

import mi_pipe
from mi_pipe.activations.store import ActivationStore
from mi_pipe.core.errors import ConfigError, HookPointError
from mi_pipe.core.stage import execute
from mi_pipe.core.store import Store
from mi_pipe.models.trained import TrainedModel
from mi_pipe.probes.probe_set import ProbeSet
from stages import harvest
from stages import probes as stage
from stages.probe_plan import Inputs, ProbesConfig
from stages.probes import STAGE
from tests.probes.planted import planted_rows, planted_store
from tests.stages.killed import resume_after_kill
from tests.stages.toys import toy_model, toy_task

HOOKS = ["blocks.0.hook_resid_pre", "blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]
LABELS = {"low": {"where": "token_id < 32"}, "place": {"column": "pos", "kind": "regression"}}
FIT = {"l2": [1e-3, 0.1], "min_class_rows": 2}


def config(**changes) -> ProbesConfig:
    fields = {
        "labels": LABELS,
        "positions": ["all", "last"],
        "fit": FIT,
        "causal": {"amounts": [-2, 2]},
        "device": "cpu",
    }
    return ProbesConfig(**{**fields, **changes})


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    return Store(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def inputs(store) -> Inputs:
    """A toy's residual stream on a task of pairs."""
    model = TrainedModel(toy_model(store, attn_only=False).path)
    task = toy_task(store, model, n_pairs=60)
    wanted = harvest.HarvestConfig(hooks=HOOKS, precision="float32", device="cpu", store_dtype="float32")
    acts = ActivationStore(execute(harvest.STAGE, wanted, harvest.Inputs(model, task), store).artifact.path)
    return Inputs(acts, model, task)


@pytest.fixture(scope="module")
def probes(store, inputs) -> ProbeSet:
    found = mi_pipe.open(execute(STAGE, config(), inputs, store).artifact.path)
    assert isinstance(found, ProbeSet)
    return found


def test_a_planted_direction_is_found(tmp_path, store):
    acts, direction = planted_store(store, tmp_path, n=1500)
    labels = {"planted": {"table": tmp_path / "labels.parquet"}}
    chosen = config(labels=labels, positions=["all"], causal=None, fit={})
    found = ProbeSet(execute(STAGE, chosen, Inputs(acts), store).artifact.path)
    (hook,) = found.hooks
    row = found.find("planted", hook, "all")
    _, _, classes = planted_rows(1500)
    best_possible = 0.977  # the normal distribution at 2, half the distance of the planted means
    assert row["low"] - 0.01 < best_possible < row["high"] + 0.01
    assert row["auc"] > 0.99
    assert float(found.direction("planted", hook, "all") @ direction) > 0.95
    assert found.classes("planted", "all") == ["no", "yes"]
    table = found.predictions("planted", hook, "all")
    assert len(table) == row["n_test"]
    assert (table["predicted"] == table["target"]).mean() == pytest.approx(row["test"])
    np.testing.assert_array_equal(table["target"], classes[table["row"]])
    scores = found.scores(torch.from_numpy(acts.take(hook, table["row"].to_numpy())), "planted", hook, "all")
    np.testing.assert_allclose(scores[:, 0], table["score"], rtol=1e-3, atol=1e-4)


def test_pairs_are_never_parted(probes, inputs):
    acts = inputs.activations
    pair = acts.prompts["pair"].to_numpy()
    tested = probes.predictions("low", HOOKS[0], "all")["prompt_idx"].unique()
    assert set(pair[tested]) == set(pair[np.isin(pair, pair[tested])])
    assert len(tested) == 2 * len(set(pair[tested]))
    row = probes.find("low", HOOKS[0], "all")
    assert row["n_training"] + row["n_validation"] + row["n_test"] == acts.n_rows


def test_a_memorising_mlp_has_no_selectivity(store, inputs):
    fit = {
        "kinds": ["mlp"],
        "mlp": {"hidden": 256, "n_epochs": 150, "batch_rows": 64, "l2": [1e-6]},
        "l2": [0.1],
    }
    chosen = config(labels={"low": LABELS["low"]}, positions=["all"], hooks=HOOKS[:1], fit=fit, causal=None)
    found = ProbeSet(execute(STAGE, chosen, inputs, store).artifact.path)
    mlp = found.find("low", HOOKS[0], "all", "mlp")
    assert mlp["test"] > 0.95
    assert mlp["control"] > 0.95
    assert abs(mlp["selectivity"]) < 0.05
    assert mlp["n_types"] == 64
    assert mlp["types_seen"] == 1


def test_positions_and_kinds_of_labels(probes):
    place = probes.find("place", HOOKS[2], "all")
    assert place["n_classes"] == 0
    table = probes.predictions("place", HOOKS[2], "all")
    np.testing.assert_array_equal(table["target"], table["pos"])
    assert place["test"] == pytest.approx(r2_score(table["target"], table["predicted"]), abs=1e-6)
    assert place["low"] <= place["test"] <= place["high"]
    assert np.isnan(place["auc"])
    last = probes.predictions("low", HOOKS[0], "last")
    assert set(last["pos"]) == {5, 7}
    grid = probes.grid("test", "low")
    assert grid.dims == ("hook", "position")
    assert list(grid["layer"]) == [0, 0, 1]
    assert float(grid.sel(hook=HOOKS[0], position="all")) == probes.find("low", HOOKS[0], "all")["test"]


def test_moved_activations_are_what_a_run_by_hand_gives(probes, inputs):
    hook, later = HOOKS[1], HOOKS[2]
    model = inputs.model.load("cpu")
    row = probes.find("low", hook, "last")
    table = probes.causal.query("label == 'low' and hook == @hook and position == 'last'")
    mine = probes.weights("low", hook, "last")["weight"][0]
    theirs = probes.weights("low", later, "last")
    unit = torch.from_numpy(probes.direction("low", hook, "last"))
    prompts = inputs.prompts
    for prompt in table["prompt_idx"].unique()[:4]:
        tokens = torch.from_numpy(prompts.prompt(int(prompt)).astype(np.int64))[None]

        def move(value, hook):
            value[:, -1] += 2 * row["deviation"] * unit
            return value

        with model.bridge.hooks(fwd_hooks=[(hook, move)]):
            whole, cache = model.bridge.run_with_cache(tokens)
        logits, seen = whole[0, -1], cache[later][0, -1]
        moved = table.query("prompt_idx == @prompt and amount == 2 and direction == 'probe'").set_index("read_hook")
        wanted = float(seen @ theirs["weight"][0] + theirs["bias"][0])
        assert moved.loc[later, "reading"] == pytest.approx(wanted, rel=1e-3, abs=1e-3)
        answer, wrong = prompts.prompts.loc[prompt, ["answer_id", "wrong_id"]]
        assert moved.loc[later, "metric"] == pytest.approx(float(logits[answer] - logits[wrong]), rel=1e-3, abs=1e-3)
    effects = probes.causal_effects("low", hook, "last").set_index(["direction", "amount", "read_hook"])
    own = effects.loc[("probe", 2.0, hook), "reading"]
    assert own == pytest.approx(2 * row["deviation"] * float(mine.norm()), rel=1e-3)
    assert abs(effects.loc[("random", 2.0, hook), "reading"]) < own
    assert effects.loc[("probe", 2.0, later), "reading_low"] <= effects.loc[("probe", 2.0, later), "reading"]


def test_what_cannot_be_probed_is_one_sentence_before_work(tmp_path, store, inputs):
    def refused(error, match, given=inputs, **changes):
        with pytest.raises(error, match=match):
            execute(STAGE, config(**changes), given, store)

    refused(
        ConfigError,
        r"probes.labels.x: .* has no column 'sorce'\. Did you mean 'source'",
        labels={"x": {"column": "sorce"}},
    )
    refused(ConfigError, "has one class alone", labels={"x": {"where": "pos >= 0"}})
    refused(ConfigError, "cannot be evaluated", labels={"x": {"where": "pos >"}})
    refused(ConfigError, "no column 'pos_nowhere'", positions=["pos == pos_nowhere"])
    refused(HookPointError, "Did you mean 'blocks.1.hook_resid_post'", hooks=["blocks.1.hook_resid_pst"])
    refused(ConfigError, "cannot be imported", labels={"x": {"function": "tests.probes.planted:nothing"}})
    refused(ConfigError, "does not exist", labels={"x": {"table": tmp_path / "none.parquet"}})
    refused(ConfigError, "name the model", given=Inputs(inputs.activations))
    refused(ConfigError, r"no column 'tokn'", fit={**FIT, "control": "tokn"})
    refused(ConfigError, "No probe can be fitted", fit={**FIT, "min_class_rows": 5000}, labels={"low": LABELS["low"]})
    pd.DataFrame({"row": [0], "lbl": [1]}).to_parquet(tmp_path / "bad.parquet")
    refused(ConfigError, "a table of labels has 'label'", labels={"x": {"table": tmp_path / "bad.parquet"}})
    with pytest.raises(ValueError, match="one of column, where"):
        config(labels={"x": {"column": "pos", "where": "pos > 1"}})


def test_labels_by_import_path_and_their_identity(store, inputs):
    labels = {"even": {"function": "tests.probes.planted:parity_of_row"}}
    chosen = config(labels=labels, positions=["all"], hooks=HOOKS[:1], causal=None)
    assert "function_sha256" in chosen.identity()["labels"]["even"]
    found = ProbeSet(execute(STAGE, chosen, inputs, store).artifact.path)
    table = found.predictions("even", HOOKS[0], "all")
    np.testing.assert_array_equal(table["target"], table["row"] % 2 == 0)
    assert found.find("even", HOOKS[0], "all")["test"] < 0.75, "nothing to read"


@pytest.mark.parametrize("at", [4, 16])
def test_a_killed_stage_continues_and_ends_with_the_same_bytes(tmp_path, probes, inputs, at):
    result = resume_after_kill(stage, config(), inputs, Store(tmp_path / "other"), at=at)
    assert result.artifact.digest == probes.digest


def test_a_move_at_resid_mid_reaches_the_residual_stream_and_not_the_mlp_alone(store, inputs):
    hooks = ["blocks.0.hook_resid_mid", "blocks.0.hook_resid_post"]
    wanted = harvest.HarvestConfig(hooks=hooks, precision="float32", device="cpu", store_dtype="float32")
    given = harvest.Inputs(inputs.model, inputs.prompts)
    acts = ActivationStore(execute(harvest.STAGE, wanted, given, store).artifact.path)
    chosen = config(labels={"low": LABELS["low"]}, positions=["last"], causal={"amounts": [2], "max_prompts": 3})
    found = ProbeSet(execute(STAGE, chosen, Inputs(acts, inputs.model, inputs.prompts), store).artifact.path)
    deviation = found.find("low", hooks[0], "last")["deviation"]
    step = 2 * deviation * torch.from_numpy(found.direction("low", hooks[0], "last"))
    later = found.weights("low", hooks[1], "last")
    bridge = inputs.model.load("cpu").bridge
    table = found.causal.query("hook == @hooks[0] and read_hook == @hooks[1] and amount == 2 and direction == 'probe'")
    for prompt, reading in zip(table["prompt_idx"], table["reading"], strict=True):
        tokens = torch.from_numpy(inputs.prompts.prompt(int(prompt)).astype(np.int64))[None]
        _, cache = bridge.run_with_cache(tokens)
        mid = cache[hooks[0]][0, -1] + step
        after = mid + bridge.blocks[0].mlp(bridge.blocks[0].ln2(mid[None, None]))[0, 0]
        assert reading == pytest.approx(float(after @ later["weight"][0] + later["bias"][0]), rel=1e-3, abs=1e-3)
