"""Every unit on every architecture: equal to TransformerLens, to a loop of plain hooks, and to the plain engine."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformer_lens import patching as tl

from mi_pipe.patching.engine import SHORTCUTS, PlainEngine, RestartEngine, make_engine
from mi_pipe.patching.metrics import METRIC_NAMES, find_metric, logit_diff
from mi_pipe.patching.patches import Patches
from mi_pipe.patching.runs import run_pairs
from mi_pipe.patching.sweep import sweep_layer
from mi_pipe.patching.units import UNITS, axes_of, hook_of, is_of_sae, layers_of, present_units
from tests.patching.conftest import make_model
from tests.patching.pairs import SHARED, brute_force, random_pairs

GOAL = 1e-5
NEURONS = [5, 0, 21]
PLAIN_UNITS = [unit for unit in UNITS if not is_of_sae(unit)]
TL_FUNCTIONS = {
    "resid_pre": tl.get_act_patch_resid_pre,
    "resid_mid": tl.get_act_patch_resid_mid,
    "attn_out": tl.get_act_patch_attn_out,
    "mlp_out": tl.get_act_patch_mlp_out,
    **{
        f"{unit}{ours}": getattr(tl, f"get_act_patch_attn_head_{unit.removeprefix('head_')}_{theirs}_pos")
        for unit in ("head_out", "q", "k", "v", "pattern")
        for ours, theirs in (("", "all"), ("_by_pos", "by"))
    },
}
BY_HOOKS = ("embed", "resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "head_out", "head_out_by_pos")


def present(model):
    return present_units(PLAIN_UNITS, model.hooks, model.info.n_layers)


def all_hooks(model):
    return list(dict.fromkeys(hook_of(u, layer) for u in present(model) for layer in layers_of(u, model.info)))


def runs_of(model, group=None, direction="denoising", **options):
    return run_pairs(model, group or random_pairs(), direction, all_hooks(model), **options)


def whole_sweep(model, engine, unit, budget=64):
    layers = [sweep_layer(engine, unit, layer, budget, neurons=NEURONS) for layer in layers_of(unit, model.info)]
    return torch.from_numpy(np.stack(layers, axis=1))


def scale(runs):
    """The metric's scale: the largest absolute value it has in the two unpatched runs."""
    return float(torch.stack([runs.base_metric, runs.donor_metric]).abs().max())


def assert_close(found, wanted, runs, what):
    assert found.shape == wanted.shape, what
    assert float((found - wanted).abs().max()) <= GOAL * scale(runs), what


@pytest.mark.parametrize("direction", ["denoising", "noising"])
def test_sweeps_equal_a_brute_force_loop_of_plain_hooks(model, direction):
    group = random_pairs()
    runs = runs_of(model, group, direction)
    engine, error = make_engine(model, runs)
    assert isinstance(engine, RestartEngine)
    assert error < GOAL
    for unit in (unit for unit in present(model) if unit in BY_HOOKS):
        wanted = torch.from_numpy(brute_force(model, group, unit, direction))
        assert_close(whole_sweep(model, engine, unit), wanted, runs, unit)


def test_sweeps_equal_transformer_lens(model):
    group = random_pairs(n_pairs=2, n_pos=5)
    runs = runs_of(model, group)
    engine, _ = make_engine(model, runs)
    _, cache = model.bridge.run_with_cache(group.clean)
    for unit, function in TL_FUNCTIONS.items():
        if unit not in present(model) or (unit == "resid_mid" and model.info.architecture == "GPT2LMHeadModel"):
            continue  # theirs is the MLP's input alone on GPT-2; the brute force above has the whole stream
        wanted = function(
            model.bridge,
            group.corrupted,
            cache,
            lambda logits: logit_diff(logits[:, -1], group.answer, group.wrong),
            reduce="none",
        ).values
        found = whole_sweep(model, engine, unit).permute(1, *range(2, 2 + len(axes_of(unit))), 0)
        if unit.endswith("_by_pos") and unit != "pattern_by_pos":
            found = found.transpose(1, 2)  # theirs is (layer, pos, head)
        if unit.startswith(("k", "v")) and wanted.shape != found.shape:
            wanted = wanted[..., : model.info.n_kv_heads, :]  # theirs fills up with zeros
        assert_close(found, wanted, runs, unit)


@pytest.mark.parametrize("left_out", [*SHORTCUTS[1:], "all"])
def test_every_shortcut_alone_leaves_the_numbers_as_they_are(model, left_out):
    runs = runs_of(model)
    shortcuts = ["restart"] if left_out == "all" else [name for name in SHORTCUTS if name != left_out]
    engine, plain = RestartEngine(model, runs, shortcuts), PlainEngine(model, runs)
    assert left_out not in engine.shortcuts
    for unit in present(model):
        assert_close(whole_sweep(model, engine, unit, 200), whole_sweep(model, plain, unit, 200), runs, unit)


@pytest.mark.parametrize("name", METRIC_NAMES)
def test_every_metric_is_that_of_the_plain_engine(name):
    model = make_model("llama_gqa")
    runs = runs_of(model, metric=find_metric(name))
    engine, error = make_engine(model, runs)
    assert isinstance(engine, RestartEngine)
    assert error < GOAL
    for unit in ("resid_mid", "head_out_by_pos", "neuron"):
        assert_close(whole_sweep(model, engine, unit), whole_sweep(model, PlainEngine(model, runs), unit), runs, unit)
    if name == "kl":
        assert bool((runs.donor_metric.abs() < 1e-6).all()), "the donor run is the clean one"


def test_which_shortcuts_an_architecture_allows(model):
    engine, _ = make_engine(model, runs_of(model))
    missing = set(SHORTCUTS) - engine.shortcuts
    assert missing == ({"prefix"} if model.info.architecture == "TransformerLensNative" else set())


def test_no_shortcuts_is_the_plain_engine():
    model = make_model("gpt2")
    assert isinstance(make_engine(model, runs_of(model), [])[0], PlainEngine)


def test_a_model_whose_logits_the_engine_cannot_make_falls_back_to_plain_hooks(monkeypatch):
    model = make_model("llama_gqa")
    forward = model.module.forward

    def odd(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = torch.sinh(output.logits)
        return output

    monkeypatch.setattr(model.module, "forward", odd)
    group = random_pairs()
    runs = runs_of(model, group)
    assert RestartEngine(model, runs).largest_error() > 1e-3
    engine, error = make_engine(model, runs)
    assert isinstance(engine, PlainEngine)
    assert error == 0.0
    for unit in ("resid_mid", "head_out", "attn_out"):
        assert_close(whole_sweep(model, engine, unit), torch.from_numpy(brute_force(model, group, unit)), runs, unit)


def test_patching_every_position_of_the_first_residual_restores_the_clean_run(model):
    runs = runs_of(model)
    engine, _ = make_engine(model, runs)
    everything = Patches(hook_of("resid_pre", 0), torch.arange(3))
    torch.testing.assert_close(engine.patched_metric(everything), runs.donor_metric, rtol=1e-5, atol=1e-5)


def test_patching_corrupted_into_corrupted_changes_nothing(model):
    group = random_pairs()
    same = type(group)(group.pairs, group.corrupted, group.corrupted, group.answer, group.wrong, group.labels)
    runs = runs_of(model, same)
    assert runs.first_change.tolist() == [group.n_pos] * 3
    engine, _ = make_engine(model, runs)
    for unit in present(model):
        assert bool((whole_sweep(model, engine, unit) == _like(runs.base_metric, unit)).all())
        patch = Patches(hook_of(unit, layers_of(unit, model.info)[-1]), torch.arange(3), first_pos=1)
        torch.testing.assert_close(engine.patched_metric(patch), runs.base_metric, rtol=1e-5, atol=1e-5)


def _like(metric, unit):
    return metric.view(-1, 1, *[1] * len(axes_of(unit)))


def test_patching_all_parts_of_the_last_block_restores_the_clean_run(model):
    """What enters the last block, what its attention and what its MLP write, patched at once, is the clean run."""
    group = random_pairs()
    last = model.info.n_layers - 1
    hooks = [hook_of(unit, last) for unit in ("resid_pre", "attn_out", "mlp_out") if unit in present(model)]
    donors = run_pairs(model, group, "denoising", hooks).donors
    with model.edited({hook: lambda _value, hook=hook: donors[hook] for hook in hooks}), torch.no_grad():
        logits = model.logits(group.corrupted)[:, -1]
    runs = runs_of(model, group)
    torch.testing.assert_close(logit_diff(logits, group.answer, group.wrong), runs.donor_metric, rtol=1e-5, atol=1e-5)


def test_no_cell_depends_on_the_others_or_on_the_batches(model):
    runs = runs_of(model)
    engine, _ = make_engine(model, runs)
    alone = runs_of(model, _one_pair(random_pairs(), 1))
    engine_alone, _ = make_engine(model, alone)
    for unit in ("resid_pre", "head_out"):
        found = whole_sweep(model, engine, unit, 40)
        assert_close(whole_sweep(model, engine, unit, 10_000), found, runs, unit)
        assert_close(whole_sweep(model, engine_alone, unit)[0], found[1], runs, unit)


def _one_pair(group, row):
    rows = slice(row, row + 1)
    return replace(
        group,
        **{name: getattr(group, name)[rows] for name in ("pairs", "clean", "corrupted", "answer", "wrong")},
    )


def test_positions_before_the_first_difference_have_exactly_the_base_metric(model):
    runs = runs_of(model)
    engine, _ = make_engine(model, runs)
    found = whole_sweep(model, engine, "resid_pre")
    assert runs.first_change.tolist() == [SHARED + 1, SHARED, SHARED]
    assert bool((found[:, :, :SHARED] == runs.base_metric[:, None, None]).all())
    assert bool((found[:, :, -1] != runs.base_metric[:, None]).any())


def test_an_attention_only_model_has_no_mlp():
    missing = set(PLAIN_UNITS) - set(present(make_model("native_attn_only")))
    assert missing == {"resid_mid", "mlp_out", "neuron"}


def test_parallel_blocks_have_no_state_between_attention_and_mlp():
    assert set(PLAIN_UNITS) - set(present(make_model("neox"))) == {"resid_mid"}
