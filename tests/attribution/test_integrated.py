"""Integrated gradients: completeness, convergence to exact patching, conventions and directions."""

import pytest
import torch

from mi_pipe.attribution.atp import PairTokens, atp
from mi_pipe.attribution.integrated import ig_activations, ig_inputs
from mi_pipe.circuits.eap import ig_alphas
from tests.attribution import plain
from tests.circuits import tiny


def of(pairs):
    return PairTokens(pairs.corrupted, pairs.clean)


@pytest.mark.parametrize("name", ["gpt2", "llama_gqa", "native"])
def test_effects_of_the_embeddings_sum_to_the_metrics_difference(name):
    model, pairs = tiny.model(name), tiny.pairs()
    errors = []
    for n_steps in (4, 16, 64):
        alphas = ig_alphas(n_steps, "midpoint")
        found = ig_inputs(model, of(pairs), plain.metric_of(pairs), ["embed"], alphas, "denoising")
        errors.append(float((found.whole["embed"] - (found.donor - found.base)).abs().max()))
    assert errors[2] < errors[0] / 4
    assert errors[2] < 0.02 * float((found.donor - found.base).abs().max())


@pytest.mark.parametrize(
    "kind", ["resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "z", "q", "k", "v", "neuron"]
)
@pytest.mark.parametrize("name", ["gpt2", "llama_gqa"])
def test_effects_of_a_layers_own_path_sum_to_patching_it_all(name, kind):
    model, pairs = tiny.model(name), tiny.pairs()
    layer, alphas = 1, ig_alphas(64, "midpoint")
    found = ig_activations(model, of(pairs), plain.metric_of(pairs), [kind], alphas, "denoising")
    total = found.effects[kind][:, layer].flatten(1).sum(1)
    if kind == "resid_mid":
        exact = found.donor - found.base  # nothing goes past it
    else:
        indices = range(plain.sizes(model, kind).stop) if kind in "zqkv" else [None]
        exact = all_patched(model, name, kind, layer, indices, pairs) - found.base
    assert torch.allclose(total, exact, atol=0.02 * float(exact.abs().max()) + 1e-3)


@torch.no_grad()
def all_patched(model, name, kind, layer, indices, pairs):
    """Patch all heads of a layer together with one hook each."""
    places = [plain.place(name, model, kind, layer, slice(None) if kind == "neuron" else i) for i in indices]
    seen = [[] for _ in places]
    plain.run(
        model, pairs.clean, pairs, [(p, lambda v, s=s: s.append(v.clone())) for p, s in zip(places, seen, strict=True)]
    )

    def replace(place, donor):
        def edit(value):
            value = value.clone()
            place.part(value).copy_(place.part(donor[0]))
            return value

        return edit

    return plain.run(model, pairs.corrupted, pairs, [(p, replace(p, s)) for p, s in zip(places, seen, strict=True)])


def test_steps_lie_where_their_convention_says():
    model, pairs = tiny.model("native"), tiny.pairs()
    metric = plain.metric_of(pairs)
    clean, corrupted = (PairTokens(*t) for t in ((pairs.clean, pairs.corrupted), (pairs.corrupted, pairs.clean)))
    # One step: left is the gradient at the corrupted run, right that at the clean run.
    for convention, at in (("left", corrupted), ("right", clean)):
        alphas = ig_alphas(1, convention)
        found = ig_inputs(model, corrupted, metric, ["z", "embed"], alphas, "denoising")
        expected = atp(model, at, metric, ["z", "embed"])
        sign = 1 if convention == "left" else -1
        for kind in ("z", "embed"):
            assert torch.allclose(found.effects[kind], sign * expected.effects[kind], atol=1e-10)


def test_both_directions_take_the_same_path_the_other_way():
    model, pairs = tiny.model("llama_gqa"), tiny.pairs()
    alphas, metric = ig_alphas(3, "left"), plain.metric_of(pairs)
    there = ig_inputs(model, of(pairs), metric, ["z", "k"], alphas, "denoising")
    back = ig_inputs(model, PairTokens(pairs.clean, pairs.corrupted), metric, ["z", "k"], alphas, "noising")
    for kind in ("z", "k"):
        assert torch.allclose(there.effects[kind], -back.effects[kind], atol=1e-6)


def test_a_linear_models_integrated_gradients_are_its_exact_effects_at_any_number_of_steps():
    model, pairs = plain.linear_model(), tiny.pairs()
    metric = plain.metric_of(pairs)
    one = atp(model, of(pairs), metric, ["z", "v", "attn_out"])
    for method in (ig_inputs, ig_activations):
        found = method(model, of(pairs), metric, ["z", "v", "attn_out"], ig_alphas(2, "left"), "denoising")
        for kind, value in found.effects.items():
            assert torch.allclose(value, one.effects[kind], atol=1e-10)
