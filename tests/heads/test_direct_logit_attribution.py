import numpy as np
import pytest
import torch

from mi_pipe.core.errors import HookPointError, StageError
from mi_pipe.heads.direct_logit_attribution import check_direct_logit_attribution, direct_logit_attribution
from mi_pipe.models.head_weights import head_weights
from mi_pipe.models.hook_points import HookMap
from tests.circuits.reference import Reference, plain
from tests.circuits.tiny import HF_CONFIGS, NATIVE_FIELDS, ODD_CONFIGS, REFERENCED, model, pairs

PAIRS = pairs(n_pairs=4)
ROWS = torch.arange(4)


def attributed(name):
    return direct_logit_attribution(model(name), PAIRS.clean, PAIRS.answer, PAIRS.wrong)


@pytest.mark.parametrize("name", [*HF_CONFIGS, *ODD_CONFIGS, *NATIVE_FIELDS])
def test_contributions_sum_to_the_models_own_logit_difference(name):
    found = attributed(name)
    logits = model(name).logits(PAIRS.clean)[:, -1].detach()
    if name == "gemma2":
        cap = model(name).module.config.final_logit_softcapping
        logits = cap * torch.atanh(logits / cap)
    expected = (logits[ROWS, PAIRS.answer] - logits[ROWS, PAIRS.wrong]).numpy()
    # Norms of transformers compute in float32, whatever the model's dtype.
    np.testing.assert_allclose(found.total, expected, atol=2e-6 * float(logits.abs().max()))
    np.testing.assert_allclose(found.logit_diff, expected, atol=1e-5 * float(logits.abs().max()))


@pytest.mark.parametrize("name", REFERENCED)
def test_contributions_are_those_of_a_transformer_written_out_head_by_head(name):
    found, reference = attributed(name), Reference(name, model(name).module)
    with torch.no_grad():
        _, written = reference.run(PAIRS.clean, plain)
        seen = []
        reference.run(
            PAIRS.clean, lambda reader, parts, constant: seen.append(plain(reader, parts, constant)) or seen[-1]
        )
        norm, head = reference.tail()
        stream = seen[-1][:, -1]
        wanted = head.weight[PAIRS.answer] - head.weight[PAIRS.wrong]
        scale = norm_scale(norm, stream)

        def contribution(part):
            value = part[:, -1] - (part[:, -1].mean(-1, keepdim=True) if is_centred(norm) else 0)
            return (value / scale * norm.weight * wanted).sum(-1).numpy()

    for layer in range(reference.n_layers):
        for number in range(reference.n_heads):
            expected = contribution(written[f"a{layer}.h{number}"])
            np.testing.assert_allclose(found.heads[:, layer, number], expected, atol=1e-5)
        if reference.has_mlp:
            np.testing.assert_allclose(found.mlps[:, layer], contribution(written[f"m{layer}"]), atol=1e-5)
    np.testing.assert_allclose(found.embed + found.pos_embed, contribution(written["embed"]), atol=1e-5)


def test_the_position_embedding_is_told_apart():
    found, here = attributed("gpt2"), model("gpt2")
    assert np.abs(found.pos_embed).min() > 0
    assert (attributed("llama_gqa").pos_embed == 0).all()
    with torch.no_grad():
        here.module.transformer.wpe.weight.mul_(0)
        try:
            assert (attributed("gpt2").pos_embed == 0).all()
        finally:
            model.cache_clear()


def test_heads_behind_a_post_norm_sum_to_what_it_lets_through():
    here, found = model("gemma2"), attributed("gemma2")
    seen = {}
    with here.edited({f"blocks.1.{part}": lambda v, part=part: seen.update({part: v}) for part in ("hook_attn_out",)}):
        here.logits(PAIRS.clean)
    with here.edited({"ln_final.hook_in": lambda v: seen.update(final=v)}):
        here.logits(PAIRS.clean)
    attended, stream = seen["hook_attn_out"][:, -1], seen["final"][:, -1]
    scale = (stream.square().mean(-1, keepdim=True) + here.final_norm.eps).sqrt()
    wanted = here.W_U.T[PAIRS.answer] - here.W_U.T[PAIRS.wrong]
    expected = (attended / scale * (1 + here.final_norm.weight) * wanted).sum(-1).detach().numpy()
    np.testing.assert_allclose(found.heads[:, 1].sum(-1) + found.attn_bias[:, 1], expected, atol=1e-5)
    assert head_weights(here, 1).b_O is None


def test_a_model_that_scales_its_blocks_is_refused():
    here = model("llama_gqa")
    with here.edited({"blocks.1.hook_out": lambda value: value * 1.5}), pytest.raises(StageError, match="do not sum"):
        direct_logit_attribution(here, PAIRS.clean, PAIRS.answer, PAIRS.wrong)


def test_a_model_without_z_is_refused_before_it_loads():
    here = model("gpt2")
    check_direct_logit_attribution(here.hooks, here.info)
    with pytest.raises(HookPointError):
        check_direct_logit_attribution(HookMap([site for site in here.hooks if "hook_z" not in site.name]), here.info)


def is_centred(norm):
    return getattr(norm, "bias", None) is not None


def norm_scale(norm, stream):
    eps = getattr(norm, "eps", None) or norm.variance_epsilon
    centred = stream - stream.mean(-1, keepdim=True) if is_centred(norm) else stream
    return (centred.square().mean(-1, keepdim=True) + eps).sqrt()
