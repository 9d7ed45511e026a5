"""The lens at the last depth is the model, whatever the architecture does to its logits."""

import pytest
import torch
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from mi_pipe.core.errors import ModelError
from mi_pipe.lenses.final_layers import FinalLayers
from mi_pipe.lenses.residuals import run_residuals
from mi_pipe.models.handle import resolve_model
from mi_pipe.models.source import load_source
from tests.models.tiny import tiny_tokenizer

LLAMA = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
KINDS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=64, n_embd=32, n_layer=2, n_head=4)),
    "neox": lambda: GPTNeoXForCausalLM(
        GPTNeoXConfig(**{key: value for key, value in LLAMA.items() if key != "num_key_value_heads"})
    ),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**LLAMA, head_dim=8, final_logit_softcapping=0.02)),
    "granite": lambda: GraniteForCausalLM(GraniteConfig(**LLAMA, logits_scaling=4.0)),
    "cohere": lambda: CohereForCausalLM(CohereConfig(**LLAMA, logit_scale=0.25)),
}


def tiny(kind, folder, store):
    torch.manual_seed(0)
    KINDS[kind]().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return load_source(resolve_model(str(folder), store, device="cpu"))


OPT = {key: LLAMA[key] for key in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")}


@pytest.mark.parametrize("kind", KINDS)
def test_the_lens_of_the_last_layer_equals_the_model_s_logits_exactly(kind, tmp_path, store):
    model = tiny(kind, tmp_path / "model", store)
    tokens = torch.randint(0, 64, (3, 9), generator=torch.Generator().manual_seed(1))
    residuals, logits = run_residuals(model, tokens, [0, 1, 2])
    final = FinalLayers(model)
    assert torch.equal(final.logits(residuals[2]), logits)
    assert not torch.allclose(final.logits(residuals[1]), logits)
    assert final.check(residuals[2], logits) == 0
    with torch.no_grad():
        assert torch.equal(model.module(tokens).logits, logits)


def test_a_model_whose_logits_come_about_otherwise_is_refused(tmp_path, store):
    model = tiny("llama", tmp_path / "model", store)
    residuals, logits = run_residuals(model, torch.arange(6)[None], [2])
    with pytest.raises(ModelError, match="would show other tokens"):
        FinalLayers(model).check(residuals[2], 2 * logits)


def test_a_projection_between_the_last_block_and_the_unembedding_is_refused(tmp_path, store, monkeypatch):
    narrow = OPTConfig(**OPT, ffn_dim=64, max_position_embeddings=64, word_embed_proj_dim=16)
    monkeypatch.setitem(KINDS, "opt", lambda: OPTForCausalLM(narrow))
    model = tiny("opt", tmp_path / "model", store)
    residuals, logits = run_residuals(model, torch.arange(6)[None], [2])
    with pytest.raises(ModelError, match="do not take its last residual stream"):
        FinalLayers(model).check(residuals[2], logits)
