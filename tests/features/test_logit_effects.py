import numpy as np
import pytest
import torch
from torch import nn
from transformers import GemmaConfig, GPT2Config, LlamaConfig
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from mi_pipe.core.errors import ModelError
from mi_pipe.features import logit_effects as module
from mi_pipe.features.logit_effects import FoldedNorm, fold_norm, logit_effects
from mi_pipe.models.trained import native_module, wrap_native


def randomised(norm):
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return norm


@pytest.mark.parametrize("d_model", [2, 3, 16, 17])
def test_layer_norm_is_centred_and_its_bias_has_no_part(d_model):
    norm = randomised(nn.LayerNorm(d_model))
    folded = fold_norm(norm, d_model, torch.zeros(1))
    assert folded.is_centred
    torch.testing.assert_close(folded.weight, norm.weight.data, rtol=1e-4, atol=1e-5)


def test_rms_norms_give_the_weight_that_they_multiply_by():
    llama, gemma = randomised(LlamaRMSNorm(16)), randomised(GemmaRMSNorm(16))
    for norm, weight in ((llama, llama.weight), (gemma, 1 + gemma.weight)):
        folded = fold_norm(norm, 16, torch.zeros(1))
        assert not folded.is_centred
        torch.testing.assert_close(folded.weight, weight.data, rtol=1e-5, atol=1e-6)


def test_no_norm_is_the_identity():
    folded = fold_norm(nn.Identity(), 8, torch.zeros(1))
    assert not folded.is_centred
    assert folded.weight.tolist() == [1.0] * 8


def test_bfloat16_norms_are_measured_in_their_own_dtype():
    norm = randomised(LlamaRMSNorm(16)).bfloat16()
    folded = fold_norm(norm, 16, torch.zeros(1, dtype=torch.bfloat16))
    torch.testing.assert_close(folded.weight, norm.weight.data.float(), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("no_norm", [nn.Tanh(), nn.Softmax(-1), nn.Sigmoid()])
def test_a_module_that_is_no_norm_is_refused(no_norm):
    with pytest.raises(ModelError, match="is not a LayerNorm"):
        fold_norm(no_norm, 8, torch.zeros(1))


def brute_effect(direction, weight, is_centred, matrix):
    d_model, d_vocab = matrix.shape
    mean = sum(direction) / d_model if is_centred else 0.0
    return [sum((direction[i] - mean) * weight[i] * matrix[i, t] for i in range(d_model)) for t in range(d_vocab)]


@pytest.mark.parametrize("is_centred", [True, False])
def test_effects_and_their_order_equal_a_plain_loop(is_centred, monkeypatch):
    monkeypatch.setattr(module, "EFFECT_ENTRIES", 60)
    rng = np.random.default_rng(0)
    directions, weight, matrix = rng.normal(size=(7, 5)), rng.normal(size=5), rng.normal(size=(5, 23))
    found = logit_effects(
        torch.tensor(directions).float(),
        FoldedNorm(torch.tensor(weight).float(), is_centred),
        torch.tensor(matrix).float(),
        4,
    )
    for feature in range(7):
        effect = np.array(brute_effect(directions[feature], weight, is_centred, matrix))
        order = np.argsort(-effect)
        assert found.promoted[feature].tolist() == order[:4].tolist()
        assert found.suppressed[feature].tolist() == order[::-1][:4].tolist()
        np.testing.assert_allclose(found.promoted_effect[feature], effect[order[:4]], rtol=1e-4)
        np.testing.assert_allclose(found.suppressed_effect[feature], effect[order[::-1][:4]], rtol=1e-4)


def test_no_more_tokens_are_returned_than_the_vocabulary_has():
    found = logit_effects(torch.ones(2, 3), FoldedNorm(torch.ones(3), False), torch.randn(3, 4), 10)
    assert found.promoted.shape == (2, 4)


@pytest.mark.parametrize("normalization_type", ["LN", "RMS", "LNPre", "RMSPre", None])
def test_effects_are_the_derivative_of_the_models_own_logits_times_the_norms_scale(normalization_type):
    """Add a little of a direction before the final norm, with the scale held: the logits move by the effect."""
    fields = {
        "n_layers": 1, "d_model": 16, "n_ctx": 8, "n_heads": 2, "d_head": 8, "d_vocab": 11, "attn_only": True,
        "normalization_type": normalization_type, "seed": 0,
    }  # fmt: skip
    model = wrap_native(native_module(fields))
    randomised(model.final_norm)
    resid = torch.randn(16, dtype=torch.float64)
    direction = torch.randn(16, dtype=torch.float64)
    folded = fold_norm(model.final_norm, 16, model.W_U)
    found = logit_effects(direction[None].float(), folded, model.W_U, 11)
    centred = resid - resid.mean() if folded.is_centred else resid
    scale = 1.0 if normalization_type is None else centred.square().mean().sqrt()
    # Move along the part of the direction that does not change the scale, to which the formula must be exact.
    moving = direction - (direction @ centred) / (centred @ centred) * centred
    if folded.is_centred:
        moving = moving - moving.mean()
    double_norm, matrix = model.final_norm.double(), model.W_U.double()
    step = 1e-4
    moved = (double_norm(resid + step * moving) - double_norm(resid - step * moving)) @ matrix / (2 * step) * scale
    expected = (folded.apply(moving.float()[None])[0]) @ model.W_U.float()
    torch.testing.assert_close(moved.float(), expected, rtol=1e-3, atol=1e-3)
    by_token = torch.zeros(11)
    by_token[torch.tensor(found.promoted[0]).long()] = torch.tensor(found.promoted_effect[0])
    torch.testing.assert_close(by_token, folded.apply(direction.float()[None])[0] @ model.W_U.float())


def test_hugging_face_models_of_three_families_are_folded():
    from transformers import GemmaForCausalLM, GPT2LMHeadModel, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=11, **sizes)).model.norm
    gemma = GemmaForCausalLM(GemmaConfig(vocab_size=11, head_dim=8, num_key_value_heads=1, **sizes)).model.norm
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=11, n_embd=16, n_layer=1, n_head=2)).transformer.ln_f
    kinds = [fold_norm(randomised(norm), 16, torch.zeros(1)).is_centred for norm in (llama, gemma, gpt2)]
    assert kinds == [False, False, True]


@pytest.mark.real_model
def test_on_smollm2_the_logits_move_by_the_effect_when_a_direction_is_added_to_the_residual(smollm2):
    from mi_pipe.models.source import load_source

    model = load_source(smollm2, "cpu")
    norm = fold_norm(model.final_norm, model.info.d_model, model.W_U)
    torch.testing.assert_close(norm.weight, model.final_norm.weight.float(), rtol=1e-4, atol=1e-5)
    assert not norm.is_centred
    generator = torch.Generator().manual_seed(0)
    resid = torch.randn(model.info.d_model, generator=generator)
    # Across the residual, so that the norm's scale stays as it is up to second order.
    direction = torch.randn(model.info.d_model, generator=generator)
    direction -= (direction @ resid) / (resid @ resid) * resid
    found = logit_effects(direction[None], norm, model.W_U, 5)

    def logits(step):
        return model.unembedding(model.final_norm(resid + step * direction))

    moved = (logits(0.01) - logits(-0.01)) / 0.02 * resid.square().mean().sqrt()
    assert found.promoted[0, 0] == moved.argmax()
    assert found.suppressed[0, 0] == moved.argmin()
    np.testing.assert_allclose(found.promoted_effect[0], moved[found.promoted[0]], rtol=5e-3)
