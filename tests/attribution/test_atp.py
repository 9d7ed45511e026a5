"""AtP against finite differences, TransformerLens and exact patching of a linear model; all in float64."""

import pytest
import torch
from transformer_lens.tools.analysis.attribution_patching import attribution_patch

from mi_pipe.attribution.atp import PairTokens, atp
from mi_pipe.attribution.nodes import KINDS, axes_of, present_kinds
from mi_pipe.attribution.recording import check_watched_attention
from tests.attribution import plain
from tests.circuits import tiny


def tokens_of(pairs, direction):
    base, donor = (pairs.corrupted, pairs.clean) if direction == "denoising" else (pairs.clean, pairs.corrupted)
    return PairTokens(base, donor)


@pytest.mark.parametrize("direction", ["denoising", "noising"])
@pytest.mark.parametrize("name", plain.NAMES)
def test_every_node_is_the_derivative_towards_the_donors_value(name, direction):
    model, pairs = tiny.model(name), tiny.pairs()
    tokens = tokens_of(pairs, direction)
    kinds = present_kinds(KINDS, model.hooks, model.info)
    found = atp(model, tokens, plain.metric_of(pairs), kinds)
    assert set(found.effects) == set(kinds)
    for kind in kinds:
        if kind == "resid_mid":
            continue
        layers = [0] if kind == "embed" else range(model.info.n_layers)
        for layer in layers:
            of_layer = found.effects[kind] if kind == "embed" else found.effects[kind][:, layer]
            for index in plain.sizes(model, kind):
                where = plain.place(name, model, kind, layer, index, None if kind == "neuron" else 3)
                expected = plain.derivative(model, where, tokens.base, tokens.donor, pairs)
                cell = of_layer[:, index] if kind == "neuron" else of_layer[..., 3]
                cell = cell if index is None or kind == "neuron" else cell[:, index]
                assert torch.allclose(cell, expected, rtol=1e-5, atol=1e-8), (kind, layer, index)


@pytest.mark.parametrize("name", ["gpt2", "llama_gqa", "native", "gemma2"])
def test_resid_mid_of_all_positions_is_the_derivative_of_moving_it_by_way_of_attention(name):
    model, pairs = tiny.model(name), tiny.pairs()
    found = atp(model, tokens_of(pairs, "denoising"), plain.metric_of(pairs), ["resid_mid", "resid_pre", "attn_out"])
    # resid_mid = resid_pre + attn_out: moving attn_out alone by the difference of resid_mid moves it so.
    layer = 1
    hook = {n: f"blocks.{layer}.hook_{n}" for n in ("resid_mid", "attn_out")}
    seen = {}
    for role, tokens in (("base", pairs.corrupted), ("donor", pairs.clean)):
        with torch.no_grad(), model.edited({hook["resid_mid"]: lambda v, r=role: seen.__setitem__(r, v.clone())}):
            model.logits(tokens)
    change = seen["donor"] - seen["base"]

    scale = torch.zeros((), dtype=torch.float64, requires_grad=True)
    for i in range(len(pairs)):
        with torch.enable_grad(), model.edited({hook["attn_out"]: lambda v: v + scale * change}):
            moved = plain.metric_of(pairs)(model.logits(pairs.corrupted)[:, -1])[i]
        expected = torch.autograd.grad(moved, scale)[0]
        assert torch.allclose(found.whole["resid_mid"][i, layer], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", tiny.ODD_CONFIGS)
def test_an_mlps_output_is_its_own_whatever_its_block_does_with_it(name):
    model, pairs = tiny.model(name), tiny.pairs()
    found = atp(model, tokens_of(pairs, "denoising"), plain.metric_of(pairs), ["mlp_out"])
    mlp = model.blocks[0].fc2 if name == "opt" else model.blocks[0].mlp
    seen, scale = [], torch.zeros(len(pairs), dtype=torch.float64, requires_grad=True)
    handle = mlp.register_forward_hook(lambda _m, _a, output: seen.append(output.detach().clone()))
    with torch.no_grad():
        model.logits(pairs.corrupted)
        model.logits(pairs.clean)
    handle.remove()
    base, donor = (value.reshape(len(pairs), -1, 24) for value in seen)

    def move(_module, _args, output):
        return output + (scale[:, None, None] * (donor - base)).reshape(output.shape)

    handle = mlp.register_forward_hook(move)
    with torch.enable_grad():
        moved = plain.metric_of(pairs)(model.logits(pairs.corrupted)[:, -1])
    handle.remove()
    expected = torch.autograd.grad(moved.sum(), scale)[0]
    assert found.effects["mlp_out"].shape == (len(pairs), 2, pairs.clean.shape[1])
    assert torch.allclose(found.whole["mlp_out"][:, 0], expected, rtol=1e-6)


@pytest.mark.parametrize("name", ["gpt2", "neox", "llama", "llama_gqa"])
def test_heads_mlps_and_embeddings_are_those_of_transformer_lens(name):
    model, pairs = tiny.model(name), tiny.pairs(n_pairs=2)
    found = atp(model, PairTokens(pairs.corrupted, pairs.clean), plain.metric_of(pairs), ["embed", "z", "mlp_out"])
    model.module.requires_grad_(True)
    try:
        for i in range(len(pairs)):
            answer, wrong = pairs.answer[i], pairs.wrong[i]
            theirs = attribution_patch(
                model.bridge,
                clean=pairs.clean[i : i + 1],
                corrupt=pairs.corrupted[i : i + 1],
                metric_fn=lambda logits, a=answer, w=wrong: logits[0, -1, a] - logits[0, -1, w],
            )
            seen = set()
            for node, score in theirs.node_scores.items():
                kind = {"embed": "embed", "mlp_out": "mlp_out"}.get(node.kind, "z")
                place = [i, *(x for x in (node.layer, node.head) if x is not None), node.position]
                assert float(found.effects[kind][tuple(place)]) == pytest.approx(
                    score, rel=1e-4, abs=1e-6
                )  # Llama: float32 norms
                seen.add(kind)
            assert seen == {"embed", "z", "mlp_out"}
    finally:
        model.module.requires_grad_(False)


def test_a_linear_models_attributions_are_its_exact_effects():
    model, pairs = plain.linear_model(), tiny.pairs()
    kinds = ["embed", "resid_pre", "resid_post", "attn_out", "z", "v"]
    found = atp(model, PairTokens(pairs.corrupted, pairs.clean), plain.metric_of(pairs), kinds)
    for kind in kinds:
        layer = 0 if kind == "embed" else 1
        for index in plain.sizes(model, kind):
            where = plain.place("native", model, kind, layer, index, 3)
            exact = plain.patched(model, where, pairs.corrupted, pairs.clean, pairs) - found.base
            cell = found.effects[kind] if kind == "embed" else found.effects[kind][:, layer]
            cell = cell[..., 3] if index is None else cell[:, index, 3]
            assert torch.allclose(cell, exact, atol=1e-10)
    # Effects of a linear model add up.
    assert torch.allclose(found.whole["embed"], found.donor - found.base, atol=1e-10)
    assert torch.allclose(found.whole["attn_out"].sum(1), found.whole["attn_out"][:, 0] + found.whole["attn_out"][:, 1])


@pytest.mark.parametrize("name", [*tiny.HF_CONFIGS, "native", "native_attn_only"])
def test_watched_attention_is_the_models_own(name):
    assert check_watched_attention(tiny.model(name), tiny.pairs().clean) < 1e-6


def test_pairs_do_not_see_each_other_and_equal_prompts_have_no_effect():
    model, pairs = tiny.model("llama_gqa"), tiny.pairs()
    whole = atp(model, PairTokens(pairs.corrupted, pairs.clean), plain.metric_of(pairs), KINDS)
    one = pairs.rows(1, 2)
    alone = atp(model, PairTokens(one.corrupted, one.clean), plain.metric_of(one), KINDS)
    same = atp(model, PairTokens(pairs.clean, pairs.clean), plain.metric_of(pairs), KINDS)
    for kind, value in whole.effects.items():
        assert torch.allclose(value[1:2], alone.effects[kind], atol=1e-12)
        assert not same.effects[kind].any()
        assert value.ndim == 1 + len(axes_of(kind))
    # Nothing before the first differing position has an effect.
    assert not whole.effects["resid_post"][..., 0].any()
