"""Identities of patching, as properties: whatever prompts, lengths, layers and positions."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mi_pipe.models.trained import native_module, wrap_native
from mi_pipe.patching.engine import make_engine
from mi_pipe.patching.patches import Patches
from mi_pipe.patching.runs import run_pairs
from mi_pipe.patching.sweep import sweep_layer
from mi_pipe.patching.units import hook_of
from tests.patching.conftest import NATIVE, make_model
from tests.patching.pairs import random_pairs

GQA, WITH_MLPS = make_model("llama_gqa"), make_model("native_mlp")
MODELS = st.sampled_from([GQA, WITH_MLPS])
SEEDS = st.integers(0, 2**31 - 1)
UNITS = st.sampled_from(["resid_pre", "attn_out", "mlp_out", "head_out_by_pos", "v_by_pos"])


@st.composite
def groups(draw):
    n_pos = draw(st.integers(3, 10))
    shared = draw(st.integers(0, n_pos - 2))
    return random_pairs(draw(st.integers(1, 3)), n_pos, shared=shared, seed=draw(SEEDS))


def linear_model():
    """Return a model without norms and MLPs whose attention is uniform: its logits are linear in what heads write."""
    fields = {**NATIVE, "normalization_type": None, "attn_only": True, "positional_embedding_type": "standard"}
    module = native_module(fields)
    with torch.no_grad():
        for weight in module.parameters():
            weight.mul_(3.0)
        for block in module.layers:
            block.attn.q.weight.zero_()
            block.attn.q.bias.zero_()
    return wrap_native(module)


LINEAR = linear_model()


def engine_of(model, group, hooks):
    return make_engine(model, run_pairs(model, group, "denoising", hooks))[0]


@settings(max_examples=15, deadline=None)
@given(MODELS, groups())
def test_patching_all_of_the_first_residual_restores_the_clean_run(model, group):
    engine = engine_of(model, group, ["blocks.0.hook_resid_pre"])
    patched = engine.patched_metric(Patches("blocks.0.hook_resid_pre", torch.arange(group.n_pairs)))
    torch.testing.assert_close(patched, engine.runs.donor_metric, rtol=1e-4, atol=1e-4)


@settings(max_examples=15, deadline=None)
@given(MODELS, groups(), UNITS, st.integers(0, 1))
def test_patching_a_run_into_itself_changes_nothing(model, group, unit, layer):
    same = type(group)(group.pairs, group.clean, group.clean, group.answer, group.wrong, group.labels)
    runs = run_pairs(model, same, "denoising", [hook_of(unit, layer)])
    engine = make_engine(model, runs)[0]
    found = engine.patched_metric(Patches(hook_of(unit, layer), torch.arange(group.n_pairs)))
    torch.testing.assert_close(found, runs.base_metric, rtol=1e-4, atol=1e-4)


@settings(max_examples=15, deadline=None)
@given(MODELS, groups(), UNITS, st.integers(0, 1), st.data())
def test_positions_before_the_patch_never_change(model, group, unit, layer, data):
    pos = data.draw(st.integers(1, group.n_pos - 1))
    runs = run_pairs(model, group, "denoising", [hook_of(unit, layer)])
    edit = Patches(hook_of(unit, layer), torch.arange(group.n_pairs), pos=torch.full((group.n_pairs,), pos)).edit(runs)
    seen = []
    with model.edited({hook_of(unit, layer): edit, "ln_final.hook_in": lambda value: seen.append(value.clone())}):
        model.logits(group.corrupted)
    found, base = seen[0], runs.residuals[-1]
    torch.testing.assert_close(found[:, :pos], base[:, :pos], rtol=1e-5, atol=1e-5)
    if pos == int(runs.first_change.max()):
        assert float((found[:, pos:] - base[:, pos:]).abs().max()) > 1e-4, "from the patch on there is a change"


def changes(model, group, hook, unit=None):
    """Return the sum of what patching each head of the first layer does, or without `unit` what patching all does."""
    engine = engine_of(model, group, [hook])
    base = engine.runs.base_metric.numpy()
    if unit is None:
        return engine.patched_metric(Patches(hook, torch.arange(group.n_pairs))).numpy() - base
    return (sweep_layer(engine, unit, 0, 64).reshape(len(base), -1) - base[:, None]).sum(1)


@settings(max_examples=15, deadline=None)
@given(groups())
def test_effects_of_a_linear_models_heads_add_up_to_patching_them_all(group):
    together = changes(LINEAR, group, "blocks.0.attn.hook_z")
    assert np.abs(together).max() > 1e-4
    for unit in ("head_out", "head_out_by_pos"):
        np.testing.assert_allclose(changes(LINEAR, group, "blocks.0.attn.hook_z", unit), together, rtol=1e-3, atol=1e-5)


def test_effects_of_a_model_with_norms_do_not_add_up():
    together = changes(WITH_MLPS, random_pairs(), "blocks.0.attn.hook_z")
    assert np.abs(changes(WITH_MLPS, random_pairs(), "blocks.0.attn.hook_z", "head_out") - together).max() > 1e-3
