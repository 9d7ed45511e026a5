"""Features and errors of SAEs, patched: equal to a loop of plain hooks that takes values apart by its own formulas."""

import numpy as np
import pytest
import torch

from mi_pipe.core.errors import ConfigError
from mi_pipe.patching.choice import chosen_features
from mi_pipe.patching.engine import PlainEngine, RestartEngine, make_engine
from mi_pipe.patching.interventions import Ablation
from mi_pipe.patching.patches import Patches
from mi_pipe.patching.runs import run_pairs
from mi_pipe.patching.sae_parts import ERROR, FEATURE, SAEParts
from mi_pipe.patching.sae_places import SAEPlace, check_features, check_places, saes_by_layer
from mi_pipe.patching.sweep import sweep_layer
from mi_pipe.saes.inference import InferenceRule
from mi_pipe.saes.sae import SAE
from mi_pipe.saes.sites import Sites
from tests.patching.apart import apart, brute_force, seen
from tests.patching.conftest import make_model
from tests.patching.pairs import random_pairs

D_SAE, K, CHOSEN = 24, 5, [3, 17, 0, 9]
PLACES = {
    "llama_gqa": ["hook_resid_pre", "hook_resid_mid", "attn.hook_z"],
    "gemma2": ["hook_attn_out", "hook_mlp_out", "hook_resid_post"],
}


@pytest.fixture(scope="module", params=PLACES)
def model(request):
    return make_model(request.param)


def made_sae(hook: str, width: int, seed: int = 0) -> SAE:
    random = torch.Generator().manual_seed(seed)
    encoder, decoder = (torch.randn(D_SAE, width, generator=random) for _ in range(2))
    b_enc, b_dec = torch.randn(D_SAE, generator=random), torch.randn(width, generator=random)
    rule = InferenceRule("topk", k=K) if seed % 2 else InferenceRule("threshold", threshold=torch.tensor(0.3))
    return SAE(encoder.T.contiguous(), b_enc, decoder * 0.3, b_dec, rule, hook)


def parts_of(model) -> SAEParts:
    """Give each layer an SAE at another hook point."""
    places = PLACES["gemma2" if "Gemma" in model.info.architecture else "llama_gqa"]
    hooks = {layer: f"blocks.{layer}.{name}" for layer, name in enumerate(places)}
    saes = {layer: made_sae(hook, model.hooks[hook].width, layer) for layer, hook in hooks.items()}
    return SAEParts(saes, dict.fromkeys(saes, torch.tensor(CHOSEN)))


def swept(engine, unit: str, layer: int) -> np.ndarray:
    return sweep_layer(engine, unit, layer, 64)


@pytest.mark.parametrize("direction", ["denoising", "noising"])
def test_features_and_errors_equal_a_loop_of_plain_hooks(model, direction):
    group, parts = random_pairs(), parts_of(model)
    names = [f"{sae.hook}{part}" for sae in parts.saes.values() for part in (FEATURE, ERROR)]
    runs = run_pairs(model, group, direction, names, saes=parts)
    engine, error = make_engine(model, runs)
    assert isinstance(engine, RestartEngine)
    assert error < 1e-5
    for layer, sae in parts.saes.items():
        for unit in ("sae_feature", "sae_error", "sae_feature_by_pos"):
            wanted = brute_force(model, group, sae, direction, unit, CHOSEN).reshape(swept(engine, unit, layer).shape)
            np.testing.assert_allclose(swept(engine, unit, layer), wanted, atol=3e-5, err_msg=f"{unit} {layer}")
            np.testing.assert_allclose(swept(PlainEngine(model, runs), unit, layer), wanted, atol=3e-5)
        assert np.abs(wanted - runs.base_metric[:, None, None].numpy()).max() > 1e-3, "there is something to patch"


@pytest.mark.parametrize("kind", ["zero", "mean"])
def test_ablated_features_and_errors_equal_a_loop_of_plain_hooks(model, kind):
    group, parts = random_pairs(), parts_of(model)
    ablation = Ablation(kind, "noising", [group], saes=parts)
    names = [f"{sae.hook}{part}" for sae in parts.saes.values() for part in (FEATURE, ERROR)]
    engine, _ = make_engine(model, run_pairs(model, group, "noising", names, ablation=ablation, saes=parts))
    for layer, sae in parts.saes.items():
        donor = apart(sae, seen(model, sae.hook, group.corrupted))
        fill = torch.zeros_like if kind == "zero" else lambda value: value.mean((0, 1)).expand_as(value)
        for unit in ("sae_feature", "sae_error_by_pos"):
            wanted = brute_force(model, group, sae, "noising", unit, CHOSEN, tuple(map(fill, donor)))
            np.testing.assert_allclose(
                swept(engine, unit, layer), wanted.squeeze(1 if "error" in unit else 2), atol=3e-5
            )


def test_all_features_and_the_error_together_are_the_hook_point(model):
    group, parts = random_pairs(), parts_of(model)
    parts = SAEParts(parts.saes, dict.fromkeys(parts.saes, torch.arange(D_SAE)))
    hooks = [sae.hook for sae in parts.saes.values()]
    runs = run_pairs(
        model, group, "denoising", [f"{h}{part}" for h in hooks for part in (FEATURE, ERROR, "")], saes=parts
    )
    for hook in hooks:
        features, error, whole = (Patches(f"{hook}{part}", torch.arange(3)) for part in (FEATURE, ERROR, ""))
        base = runs.base[hook]
        together = features.edit(runs)(base) + error.edit(runs)(base) - base
        torch.testing.assert_close(together, whole.edit(runs)(base), rtol=1e-5, atol=1e-5)
        assert float((features.edit(runs)(base) - base).abs().max()) > 0.01


def test_the_chosen_features_are_those_that_move_the_value_most(model):
    group, parts = random_pairs(), parts_of(model)
    saes = list(parts.saes.values())
    found = chosen_features(model, [group], saes, 3)
    for sae, features in zip(saes, found.tolist(), strict=True):
        clean, corrupted = (apart(sae, seen(model, sae.hook, prompts))[0] for prompts in (group.clean, group.corrupted))
        moved = [float(((clean - corrupted)[..., f, None] * sae.W_dec[f]).norm(dim=-1).mean()) for f in range(D_SAE)]
        assert features == sorted(range(D_SAE), key=lambda f: -moved[f])[:3]
    assert chosen_features(model, [group], saes, [2, 1]).tolist() == [[2, 1]] * 3


def place(name: str, text: str, width: int = 32, model: str = "") -> SAEPlace:
    return SAEPlace(name, Sites.parse(text, lambda _: width), D_SAE, model)


def test_places_that_cannot_be_patched_are_told_in_a_sentence():
    post, pre = place("a", "blocks.1.hook_resid_post"), place("b", "blocks.1.hook_resid_pre")
    trans = place("t", "blocks.0.hook_resid_pre -> blocks.0.hook_mlp_out")
    cross = place("c", "blocks.0.hook_resid_pre + blocks.1.hook_resid_pre")
    assert saes_by_layer([trans, post, pre], ["a"]) == saes_by_layer([post], None) == {1: post}
    assert saes_by_layer([trans, post], ["blocks.1.hook_resid_post"]) == {1: post}
    for asked, message in [
        (None, r"t is a transcoder \(blocks.0.hook_resid_pre -> .*Name of these: a, b\."),
        (["c"], "c is a crosscoder"),
        (["a", "b"], "a and b are both of layer 1"),
        (["blocks.1.hook_mlp_out"], r"no SAE 'blocks.1.hook_mlp_out', nor one at such a place"),
    ]:
        with pytest.raises(ConfigError, match=message):
            saes_by_layer([trans, post, pre, cross], asked)


def test_saes_of_another_model_or_width_are_told_in_a_sentence():
    hooks = make_model("llama_gqa").hooks
    check_places([place("a", "blocks.1.hook_resid_post", model="some words")], hooks, "model-1")
    for wrong, message in [
        (place("a", "blocks.1.hook_resid_post", model="model-0"), "a was trained on the model model-0, and model-1"),
        (place("a", "blocks.1.hook_resid_post", 31), "width 31, and blocks.1.hook_resid_post of the model has 32"),
        (place("a", "blocks.1.ln2.hook_normalized"), "cannot be patched"),
    ]:
        with pytest.raises(ConfigError, match=message):
            check_places([wrong], hooks, "model-1")
    with pytest.raises(ConfigError, match="24 is asked for, and a has features 0 to 23"):
        check_features([1, 24], {1: place("a", "blocks.1.hook_resid_post")})
