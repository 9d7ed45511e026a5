import numpy as np
import pytest
import torch
from transformer_lens import patching as tl

from mi_pipe.patching.engine import Patches, PlainEngine, RestartEngine, make_engine
from mi_pipe.patching.metrics import logit_diff
from mi_pipe.patching.runs import run_pairs
from mi_pipe.patching.sweep import UNITS, hook_of, present_units, sweep_layer
from tests.patching.conftest import make_model
from tests.patching.pairs import SHARED, brute_force, random_pairs

GOAL = 1e-5
TL_FUNCTIONS = {
    "resid_pre": tl.get_act_patch_resid_pre,
    "attn_out": tl.get_act_patch_attn_out,
    "mlp_out": tl.get_act_patch_mlp_out,
    "head_out": tl.get_act_patch_attn_head_out_all_pos,
}


def all_hooks(model):
    units = present_units(UNITS, model.hooks, model.info.n_layers)
    return [hook_of(unit, layer) for unit in units for layer in range(model.info.n_layers)]


def whole_sweep(model, engine, unit):
    layers = [sweep_layer(engine, unit, layer, model.info.n_heads, 64) for layer in range(model.info.n_layers)]
    return torch.from_numpy(np.stack(layers, axis=1))


def scale(runs):
    """The metric's scale: the largest absolute value it has in the two unpatched runs."""
    return float(torch.stack([runs.base_metric, runs.donor_metric]).abs().max())


@pytest.mark.parametrize("direction", ["denoising", "noising"])
def test_sweeps_equal_a_brute_force_loop_of_plain_hooks(model, direction):
    group = random_pairs()
    runs = run_pairs(model, group, direction, all_hooks(model))
    engine, error = make_engine(model, runs)
    assert isinstance(engine, RestartEngine)
    assert error < GOAL
    for unit in present_units(UNITS, model.hooks, model.info.n_layers):
        wanted = torch.from_numpy(brute_force(model, group, unit, direction))
        for candidate in (engine, RestartEngine(model, runs, reuse_prefix=False), PlainEngine(model, runs)):
            found = whole_sweep(model, candidate, unit)
            assert float((found - wanted).abs().max()) <= GOAL * scale(runs), (unit, type(candidate))


def test_sweeps_equal_transformer_lens(model):
    group = random_pairs()
    runs = run_pairs(model, group, "denoising", all_hooks(model))
    engine, _ = make_engine(model, runs)
    _, cache = model.bridge.run_with_cache(group.clean)
    for unit in present_units(UNITS, model.hooks, model.info.n_layers):
        wanted = TL_FUNCTIONS[unit](
            model.bridge,
            group.corrupted,
            cache,
            lambda logits: logit_diff(logits[:, -1], group.answer, group.wrong),
            reduce="none",
        ).values
        found = whole_sweep(model, engine, unit)
        assert float((found.permute(1, 2, 0) - wanted).abs().max()) <= GOAL * scale(runs), unit


def test_huggingface_models_run_only_the_positions_that_can_change():
    for name, reuses in (("gpt2", True), ("neox", True), ("llama_gqa", True), ("native_mlp", False)):
        model = make_model(name)
        runs = run_pairs(model, random_pairs(), "denoising", [])
        assert RestartEngine(model, runs).reuses_prefix is reuses


def test_patching_every_position_of_the_first_residual_restores_the_clean_run(model):
    runs = run_pairs(model, random_pairs(), "denoising", all_hooks(model))
    engine, _ = make_engine(model, runs)
    everything = Patches(hook_of("resid_pre", 0), torch.arange(3), torch.ones(3, 1, 1, dtype=torch.bool))
    torch.testing.assert_close(engine.patched_metric(everything), runs.donor_metric, rtol=1e-5, atol=1e-5)


def test_patching_corrupted_into_corrupted_changes_nothing(model):
    group = random_pairs()
    same = type(group)(group.pairs, group.corrupted, group.corrupted, group.answer, group.wrong, group.labels)
    runs = run_pairs(model, same, "denoising", all_hooks(model))
    assert runs.first_change.tolist() == [group.n_pos] * 3
    engine, _ = make_engine(model, runs)
    for unit in present_units(UNITS, model.hooks, model.info.n_layers):
        assert bool((whole_sweep(model, engine, unit) == runs.base_metric[:, None, None]).all())
        patch = Patches(hook_of(unit, 1), torch.arange(3), torch.ones(3, 1, 1, dtype=torch.bool), 1)
        torch.testing.assert_close(engine.patched_metric(patch), runs.base_metric, rtol=1e-5, atol=1e-5)


def test_positions_before_the_first_difference_have_exactly_the_base_metric(model):
    runs = run_pairs(model, random_pairs(), "denoising", all_hooks(model))
    engine, _ = make_engine(model, runs)
    found = whole_sweep(model, engine, "resid_pre")
    assert runs.first_change.tolist() == [SHARED + 1, SHARED, SHARED]
    assert bool((found[:, :, :SHARED] == runs.base_metric[:, None, None]).all())
    assert bool((found[:, :, -1] != runs.base_metric[:, None]).any())


def test_a_model_with_capped_logits_falls_back_to_plain_hooks():
    model = make_model("gemma2")
    group = random_pairs()
    runs = run_pairs(model, group, "denoising", all_hooks(model))
    assert RestartEngine(model, runs).largest_error() > 1e-3
    engine, error = make_engine(model, runs)
    assert isinstance(engine, PlainEngine)
    assert error == 0.0
    for unit in UNITS:
        wanted = torch.from_numpy(brute_force(model, group, unit))
        assert float((whole_sweep(model, engine, unit) - wanted).abs().max()) <= GOAL * scale(runs)


def test_an_attention_only_model_has_no_mlp_out():
    model = make_model("native_attn_only")
    assert present_units(UNITS, model.hooks, model.info.n_layers) == ["resid_pre", "attn_out", "head_out"]
