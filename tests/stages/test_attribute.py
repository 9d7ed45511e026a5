"""The stage `attribute`: stored values, exact figures beside them, paths, resume, and what is refused."""

import numpy as np
import pytest
import torch
import xarray as xr
from pydantic import ValidationError

import mi_pipe
from mi_pipe.attribution.atp import PairTokens, atp
from mi_pipe.attribution.attributions import Attributions
from mi_pipe.attribution.config import AttributionConfig, PathConfig, VerifyConfig
from mi_pipe.attribution.path_nodes import Receiver, Sender
from mi_pipe.attribution.path_patching import PathPatcher
from mi_pipe.core.errors import ConfigError, PromptError
from mi_pipe.core.stage import execute, stage_id
from mi_pipe.core.store import Store
from mi_pipe.patching.metrics import logit_diff
from stages import attribute as stage
from stages.attribute import STAGE, Inputs
from tests.stages.killed import resume_after_kill
from tests.stages.toys import toy_corpus

ALL_KINDS = ["embed", "resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "z", "q", "k", "v", "neuron"]
CONFIG = AttributionConfig(
    kinds=ALL_KINDS, max_pairs=6, device="cpu", batch_pairs=2, verify=VerifyConfig(top=3, random=2),
    paths=(PathConfig(receivers=("a1.h0.q", "a1.h2.k"), mlps="frozen"), PathConfig()),
)  # fmt: skip


@pytest.fixture(scope="module")
def store(module_store):
    return module_store


@pytest.fixture(scope="module")
def inputs(toy) -> Inputs:
    return Inputs(*toy)


@pytest.fixture(scope="module")
def found(store, inputs) -> Attributions:
    artifact = mi_pipe.open(execute(STAGE, CONFIG, inputs, store).artifact.path)
    assert isinstance(artifact, Attributions)
    return artifact


def metric_of(group):
    return lambda logits: logit_diff(logits, group.answer, group.wrong)


def test_stored_effects_are_those_of_the_method_and_nan_beyond_a_prompts_end(found, inputs):
    model = inputs.model.load("cpu")
    for group in inputs.task.pair_groups():
        rows = np.flatnonzero(group.pairs < 6)
        expected = atp(model, PairTokens(group.corrupted, group.clean), metric_of(group), ALL_KINDS)
        for kind in found.kinds:
            value = found.effects(kind).sel(pair=group.pairs[rows]).to_numpy()
            if "pos" in found.effects(kind).dims:
                assert np.isnan(value[..., group.n_pos :]).all()
                value = value[..., : group.n_pos]
            np.testing.assert_allclose(value, expected.effects[kind][rows].numpy(), rtol=2e-4, atol=1e-4)
    assert found.kinds == ALL_KINDS
    assert found.effects("k").dims == ("pair", "layer", "kv_head", "pos")
    assert found.effects("embed").dims == ("pair", "pos")
    assert found.effects("neuron", whole=True).dims == ("pair", "layer", "neuron")


def test_whole_nodes_are_sums_over_positions_and_fractions_ratios_of_means(found):
    for kind in ("z", "attn_out", "embed"):
        total = found.effects(kind).sum("pos")
        np.testing.assert_allclose(found.effects(kind, whole=True), total, rtol=1e-4, atol=1e-4)
    dataset = found.to_xarray()
    gap = float((dataset["clean"] - dataset["corrupted"]).mean())
    wanted = dataset["z_whole"].mean("pair").to_numpy() / gap
    np.testing.assert_allclose(found.fraction("z").to_numpy(), wanted, rtol=1e-5)
    assert len(found.to_pandas("z", whole=True)) == 6 * 2 * 4
    assert found.to_pandas("resid_pre")["effect"].notna().all()


def test_the_group_opens_with_plain_xarray_and_says_how_it_was_made(found):
    dataset = xr.open_zarr(found.path / "attribution.zarr", consolidated=False)
    assert dataset.attrs["method"] == "atp"
    assert dataset.attrs["direction"] == "denoising"
    assert dataset.attrs["base_run"] == "corrupted"
    assert dataset.attrs["metric"] == "logit_diff"
    assert dataset.attrs["dtype"] == "float32"
    assert dataset["z"].dtype == np.float32


def test_exact_figures_are_those_of_patching_each_node_with_a_plain_hook(found, inputs):
    model, verified, pairs = inputs.model.load("cpu"), found.verified(), found.verified_pairs()
    assert verified.groupby("kind").size().to_dict() == {
        kind: 2 if kind in ("attn_out", "mlp_out") else 5 for kind in ALL_KINDS[4:]
    }
    group = inputs.task.pair_groups()[0]
    hooks = {"attn_out": "hook_attn_out", "mlp_out": "hook_mlp_out", "z": "attn.hook_z", "neuron": "mlp.hook_post"}
    hooks |= {kind: f"attn.hook_{kind}" for kind in "qkv"}
    for row in verified.to_dict("records"):
        hook = f"blocks.{row['layer']}.{hooks[row['kind']]}"
        width = {"neuron": 1}.get(row["kind"], model.info.d_head)
        columns = slice(None) if row["index"] is None else slice(row["index"] * width, (row["index"] + 1) * width)
        seen = []
        with torch.no_grad(), model.edited({hook: lambda v, s=seen: s.append(v.clone())}):
            model.logits(group.clean)

        def edit(value, columns=columns, seen=seen):
            value = value.clone()
            value[..., columns] = seen[0][..., columns]
            return value

        with torch.no_grad(), model.edited({hook: edit}):
            patched = metric_of(group)(model.logits(group.corrupted)[:, -1])
        with torch.no_grad():
            base = metric_of(group)(model.logits(group.corrupted)[:, -1])
        stored = pairs[pairs["node"] == row["node"]].set_index("pair")["exact"]
        rows = np.flatnonzero(group.pairs < 6)
        wanted = (patched - base).numpy()[rows]
        np.testing.assert_allclose(stored.loc[group.pairs[rows]].to_numpy(), wanted, rtol=1e-3, atol=1e-4)
    assert {f"spearman_{kind}" for kind in "zqkv"} <= set(found.summary)
    assert (verified["exact_mean_abs"] + 1e-6 >= verified["exact_mean"].abs()).all()


def test_nodes_are_ranked_within_their_kind(found):
    table = found.nodes()
    for _, rows in table.groupby("kind"):
        ordered = rows.sort_values("rank")
        assert list(ordered["rank"]) == list(range(len(rows)))
        assert ordered["mean_abs"].is_monotonic_decreasing
    best = table[table["kind"] == "z"].sort_values("rank").iloc[0]
    assert found.summary["strongest_head"] == f"{best['layer']}.{best['index']}"


def test_paths_are_those_of_path_patching(found, inputs):
    model, paths = inputs.model.load("cpu"), found.paths()
    assert set(paths["mlps"]) == {"frozen", "recomputed"}
    group = inputs.task.pair_groups()[1]
    rows = np.flatnonzero(group.pairs < 6)

    def metric(logits, of):
        return logit_diff(logits, group.answer[of], group.wrong[of])

    patcher = PathPatcher(model, PairTokens(group.corrupted, group.clean), metric, "frozen")
    wanted = patcher.patched([Sender("head", 0, 1)], [Receiver("q", 1, 0), Receiver("k", 1, 2)])
    chosen = paths.query("path == 0 and sender == 'a0.h1'").set_index("pair").loc[group.pairs[rows]]
    np.testing.assert_allclose(chosen["patched"], wanted.patched[rows, 0], rtol=1e-4, atol=1e-5)
    effect = (wanted.patched[:, 0] - wanted.base)[rows]
    np.testing.assert_allclose(chosen["effect"], effect, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", ["atp_star", "ig_inputs", "ig_activations", "atp_qk_fix"])
def test_every_method_runs_through_the_stage(store, inputs, method):
    config = CONFIG.model_copy(
        update={"method": method, "kinds": ["z", "q", "k", "attn_out"], "paths": (), "ig_steps": 2, "max_pairs": 3}
    )
    found = Attributions(execute(STAGE, config, inputs, store).artifact.path)
    assert found.method == method
    values = found.effects("q", whole=True).to_numpy()
    assert np.isfinite(values).all()
    assert values.any()
    assert (method != "atp_star") or (values >= 0).all()
    assert found.to_xarray().attrs["ig_steps"] == (2 if method.startswith("ig") else 0)
    assert found.paths().empty


def test_a_killed_run_continues_and_gives_the_same(store, inputs, tmp_path, found):
    elsewhere = Store(tmp_path / "other")
    resumed = Attributions(resume_after_kill(stage, CONFIG, inputs, elsewhere, at=4).artifact.path)
    xr.testing.assert_equal(resumed.to_xarray(), found.to_xarray())
    assert resumed.verified().equals(found.verified())
    assert resumed.paths().equals(found.paths())


def test_batches_do_not_change_the_result_or_its_id(store, inputs, tmp_path, found):
    other = CONFIG.model_copy(update={"batch_pairs": 5, "batch_rows": 3})
    refs = {"model": inputs.model.id, "task": inputs.task.id}
    assert stage_id(STAGE, other, refs) == stage_id(STAGE, CONFIG, refs)
    again = Attributions(execute(STAGE, other, inputs, Store(tmp_path / "other")).artifact.path)
    xr.testing.assert_allclose(again.to_xarray(), found.to_xarray(), rtol=1e-3, atol=1e-4)


def test_a_metric_of_ones_own_counts_with_its_source(inputs):
    config = CONFIG.model_copy(update={"metric": "tests.stages.own_metric:first_logit"})
    assert config.identity()["metric_source"]
    assert "metric_source" not in CONFIG.identity()


@pytest.mark.parametrize(
    ("update", "error", "message"),
    [
        ({"metric": "logit_dif"}, ConfigError, "logit_diff"),
        ({"paths": (PathConfig(receivers=("logits", "m1")),)}, ConfigError, "receive alone"),
        ({"paths": (PathConfig(receivers=("a7.h0.q",)),)}, ConfigError, "layers 0 to 1"),
    ],
)
def test_mistakes_are_told_before_the_model_loads(store, inputs, update, error, message):
    with pytest.raises(error, match=message):
        STAGE.estimate(CONFIG.model_copy(update=update), inputs)


def test_a_corpus_and_unknown_kinds_are_refused(store, inputs, found):
    with pytest.raises(PromptError, match="without clean and corrupted pairs"):
        execute(STAGE, CONFIG, Inputs(model=inputs.model, task=toy_corpus(store, inputs.model)), store)
    with pytest.raises(ValidationError):
        AttributionConfig(kinds=["resid"])
    with pytest.raises(ConfigError, match=r"no 'resid_pr'.*resid_pre"):
        found.effects("resid_pr")
