"""The QK fix against exact patching where all after the softmax is linear, and GradDrop against detached layers."""

from contextlib import ExitStack

import pytest
import torch

from mi_pipe.attribution.atp import PairTokens, atp
from mi_pipe.attribution.atp_star import atp_star
from mi_pipe.attribution.attention_calls import AttentionCall
from mi_pipe.attribution.nodes import KINDS, present_kinds
from mi_pipe.attribution.qk_fix import pattern_change
from tests.attribution import plain
from tests.circuits import tiny


def of(pairs):
    return PairTokens(pairs.corrupted, pairs.clean)


@pytest.mark.parametrize("kind", ["q", "k"])
def test_the_qk_fix_is_exact_where_everything_after_the_softmax_is_linear(kind):
    # No norms and no MLPs: after the last layer's softmax there are only v, W_O and the unembedding.
    model, pairs = plain.sharp_model(), tiny.pairs(n_pos=7)
    fixed = atp_star(model, of(pairs), plain.metric_of(pairs), [kind], grad_drop=False)
    linear = atp(model, of(pairs), plain.metric_of(pairs), [kind])
    last = model.info.n_layers - 1
    worst, largest = 0.0, 0.0
    for head in range(model.info.n_heads):
        for pos in range(7):
            where = plain.place("native", model, kind, last, head, pos)
            exact = plain.patched(model, where, pairs.corrupted, pairs.clean, pairs) - fixed.base
            assert torch.allclose(fixed.effects[kind][:, last, head, pos], exact, atol=1e-10)
            worst = max(worst, float((linear.effects[kind][:, last, head, pos] - exact).abs().max()))
            largest = max(largest, float(exact.abs().max()))
    assert worst > 0.3 * largest, "plain AtP must be off here, or the test shows nothing"


def random_calls(n_pos=9, scale=1.0, softcap=None, window=None):
    draw = torch.Generator().manual_seed(3)

    def one(heads):
        return torch.randn(2, heads, n_pos, 5, generator=draw, dtype=torch.float64)

    seen = torch.ones(n_pos, n_pos).tril()
    if window:
        seen = seen.triu(1 - window)
    mask = torch.zeros(n_pos, n_pos, dtype=torch.float64).masked_fill(seen == 0, torch.finfo(torch.float32).min)
    base, donor = (AttentionCall(scale * one(4), scale * one(2), one(2), 0.4, mask[None, None], softcap) for _ in "bd")
    return base, donor


@pytest.mark.parametrize("options", [{}, {"softcap": 2.0}, {"window": 3}, {"scale": 6.0}, {"scale": 30.0}])
def test_pattern_changes_of_shared_keys_are_those_of_recomputing_every_pattern(options):
    base, donor = random_calls(**options)
    gradient = torch.randn(2, 4, 9, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    change = pattern_change(base, donor)
    for pos in range(9):
        query = base.q.clone()
        query[:, :, pos] = donor.q[:, :, pos]
        moved = AttentionCall(query, base.k, base.v, base.scaling, base.mask, base.softcap).z() - base.z()
        expected = (moved * gradient).sum((-1, -2))
        assert torch.allclose(change.query_effects(gradient)[:, :, pos], expected, atol=1e-9)
        for shared in range(2):
            key = base.k.clone()
            key[:, shared, pos] = donor.k[:, shared, pos]
            moved = AttentionCall(base.q, key, base.v, base.scaling, base.mask, base.softcap).z() - base.z()
            expected = (moved * gradient).sum((-1, -2, -3))
            assert torch.allclose(change.key_effects(gradient)[:, shared, pos], expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", plain.NAMES)
def test_grad_drop_is_the_mean_over_layers_of_gradients_with_the_layer_detached(name):
    model, pairs = tiny.model(name), tiny.pairs()
    kinds = present_kinds(["embed", "resid_post", "attn_out", "mlp_out", "z", "v", "neuron"], model.hooks, model.info)
    found = atp_star(model, of(pairs), plain.metric_of(pairs), kinds)
    n_layers = model.info.n_layers
    for kind in kinds:
        layer, index = (0, {"z": 2, "v": 1, "neuron": 5}.get(kind))
        # At the last position there is a way to the logits past every layer.
        pos = None if kind == "neuron" else 5
        where = plain.place(name, model, kind, layer, index, pos)
        terms = []
        for dropped in range(n_layers):
            with ExitStack() as stack:
                for branch in ("attn_out", "mlp_out"):
                    out = plain.place(name, model, branch, dropped)
                    stack.callback(plain.hooked(out, lambda v: v.detach()).remove)
                try:
                    terms.append(plain.derivative(model, where, pairs.corrupted, pairs.clean, pairs).abs())
                except RuntimeError:
                    terms.append(torch.zeros(len(pairs), dtype=torch.float64))  # nothing depends on the node
        inside = kind not in ("embed", "resid_post")
        if inside:
            terms[layer] = torch.zeros_like(terms[layer])
        expected = sum(terms) / (n_layers - 1 if inside else n_layers)
        value = found.effects[kind] if kind == "embed" else found.effects[kind][:, layer]
        cell = value[:, index] if kind == "neuron" else value[..., 5] if index is None else value[:, index, 5]
        assert torch.allclose(cell, expected, rtol=1e-4, atol=1e-6), kind
        assert kind != "z" or cell.any()


def test_without_both_parts_it_is_atp_and_values_of_grad_drop_have_no_sign():
    model, pairs = tiny.model("llama_gqa"), tiny.pairs()
    kinds = present_kinds(KINDS, model.hooks, model.info)
    plain_atp = atp(model, of(pairs), plain.metric_of(pairs), kinds)
    neither = atp_star(model, of(pairs), plain.metric_of(pairs), kinds, qk_fix=False, grad_drop=False)
    both = atp_star(model, of(pairs), plain.metric_of(pairs), kinds)
    for kind in kinds:
        assert torch.equal(plain_atp.effects[kind], neither.effects[kind])
        assert (both.effects[kind] >= 0).all()
        assert both.effects[kind].shape == neither.effects[kind].shape
        if kind in both.whole:
            assert (both.whole[kind] <= both.effects[kind].sum(-1) + 1e-9).all()
