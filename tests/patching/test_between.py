"""Patches between attention and MLP, and engines for a single pair: what other architectures than the usual do."""

import numpy as np
import pytest
import torch

from mi_pipe.core.errors import StageError
from mi_pipe.patching.chunks import take
from mi_pipe.patching.engine import PlainEngine, RestartEngine, make_engine
from mi_pipe.patching.interventions import Ablation
from mi_pipe.patching.runs import run_pairs
from mi_pipe.patching.sweep import sweep_layer
from mi_pipe.patching.units import hook_of
from tests.patching.conftest import make_model
from tests.patching.pairs import brute_force, random_pairs

LAYER, POS = 1, 3
HOOK = f"blocks.{LAYER}.hook_resid_mid"
ADDED = {"llama_gqa": ("attn_out", 1.0), "gemma2": ("attn_out", 1.0), "bloom": ("attn_out", 1.0)}
ADDED["granite"] = ("attn.hook_out", 0.3)


def zeroed_in_float64(name, group):
    """Return the logit differences with zeros at one position, from wide numbers, whose rounding does no harm."""
    model = make_model(name)
    model.module.double()
    hook, factor = ADDED[name]
    added = f"blocks.{LAYER}.{hook if hook.startswith('attn.') else 'hook_' + hook}"
    seen = []
    with model.edited({HOOK: lambda value: seen.append(value.clone())}), torch.no_grad():
        model.logits(group.clean)

    def take_away(value):
        value = value.clone()
        value[:, POS] -= seen[0][:, POS] / factor
        return value

    with model.edited({added: take_away}), torch.no_grad():
        logits = model.logits(group.clean)[:, -1]
    rows = torch.arange(group.n_pairs)
    return (logits[rows, group.answer] - logits[rows, group.wrong]).numpy()


@pytest.mark.parametrize("name", ADDED)
def test_zeros_are_zeros_which_the_next_norm_does_not_blow_up(name):
    model, group = make_model(name), random_pairs(n_pairs=2, n_pos=5)
    runs = run_pairs(model, group, "noising", [HOOK], ablation=Ablation("zero", "noising", [group]))
    wanted, scale = zeroed_in_float64(name, group), float(runs.base_metric.abs().max())
    engine, _ = make_engine(model, runs)
    assert isinstance(engine, PlainEngine if name == "bloom" else RestartEngine)
    for one in (engine, PlainEngine(model, runs)):
        found = sweep_layer(one, "resid_mid", LAYER, 64)[:, POS]
        assert np.abs(found - wanted).max() <= 1e-5 * scale, type(one).__name__


def test_blocks_that_are_not_made_of_the_value_between_are_refused(monkeypatch):
    """As where attention's output goes past the MLP in other ways than by the residual stream."""
    model, group = make_model("gpt2"), random_pairs()
    block = model.blocks[LAYER]
    normed, forward = block.ln_1, block.forward
    monkeypatch.setattr(
        block, "forward", lambda hidden, *args, **kwargs: forward(hidden, *args, **kwargs) + normed(hidden)
    )
    runs = run_pairs(model, group, "denoising", [HOOK])
    with pytest.raises(StageError, match=r"GPT2LMHeadModel's blocks is not made .* Leave the unit resid_mid out\.$"):
        make_engine(model, runs)


@pytest.mark.parametrize("name", ["bloom", "opt", "gemma2"])
def test_a_single_pair_is_patched_like_the_same_pair_among_others(name):
    """Bloom's blocks are called with position biases that were captured from one row and fit one row alone."""
    model, group = make_model(name), random_pairs(n_pairs=2, n_pos=5)
    alone = take(group, np.array([1]))
    hooks = [f"blocks.{LAYER}.attn.hook_z", f"blocks.{LAYER}.hook_resid_pre"]
    for unit in ("head_out", "resid_pre"):
        found, together = (
            sweep_layer(make_engine(model, run_pairs(model, some, "denoising", hooks))[0], unit, LAYER, 64)[-1]
            for some in (alone, group)
        )
        np.testing.assert_allclose(found, together, rtol=1e-4, atol=1e-5)


def test_mlps_that_know_no_batch_are_patched_like_others():
    """OPT's MLPs are given (pair * pos, d_model)."""
    model, group = make_model("opt"), random_pairs(n_pairs=2, n_pos=4)
    units = ("resid_mid", "mlp_out", "head_out")
    runs = run_pairs(model, group, "denoising", [hook_of(unit, LAYER) for unit in (*units, "neuron")])
    engine, _ = make_engine(model, runs)
    assert isinstance(engine, RestartEngine)
    for unit in units:
        wanted = brute_force(model, group, unit)[:, LAYER]
        np.testing.assert_allclose(sweep_layer(engine, unit, LAYER, 64), wanted, rtol=1e-4, atol=1e-5)
    of_neurons = [sweep_layer(one, "neuron", LAYER, 64, neurons=[3, 40]) for one in (engine, PlainEngine(model, runs))]
    np.testing.assert_allclose(*of_neurons, rtol=1e-4, atol=1e-5)


def test_models_that_keep_other_states_than_keys_and_values_are_patched_without_the_prefix():
    model, group = make_model("lfm2"), random_pairs(n_pairs=2, n_pos=4)
    runs = run_pairs(model, group, "denoising", ["blocks.1.hook_resid_pre"])
    engine, _ = make_engine(model, runs)
    assert isinstance(engine, RestartEngine)
    assert "prefix" not in engine.shortcuts
    wanted = brute_force(model, group, "resid_pre")[:, LAYER]
    np.testing.assert_allclose(sweep_layer(engine, "resid_pre", LAYER, 64), wanted, rtol=1e-4, atol=1e-5)
