"""Tiny models of the architectures that patching is shown on; weights are random and large enough to matter."""

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    Lfm2Config,
    LlamaConfig,
    OPTConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from mi_pipe.models.loading import wrap_hf_model
from mi_pipe.models.model import Model
from mi_pipe.models.trained import native_module, wrap_native

D_VOCAB = 97
N_CTX = 32
SIZES = {"num_hidden_layers": 3, "hidden_size": 32, "num_attention_heads": 4, "vocab_size": D_VOCAB}
SPECIAL = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
LONG = {"intermediate_size": 48, "max_position_embeddings": N_CTX, "initializer_range": 0.2, **SPECIAL}
HF_CONFIGS = {
    "gpt2": GPT2Config(
        n_layer=3, n_embd=32, n_head=4, vocab_size=D_VOCAB, n_positions=N_CTX, initializer_range=0.2, **SPECIAL
    ),
    "neox": GPTNeoXConfig(**SIZES, **LONG),
    "llama_gqa": LlamaConfig(**SIZES, num_key_value_heads=2, **LONG),
    "gemma2": Gemma2Config(
        **SIZES, num_key_value_heads=2, head_dim=8, final_logit_softcapping=2.0, attn_logit_softcapping=2.0, **LONG
    ),
    "qwen3": Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=8, **LONG),
    "opt": OPTConfig(
        **SIZES, ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=N_CTX, init_std=0.2, **SPECIAL
    ),
    "bloom": BloomConfig(n_layer=3, hidden_size=32, n_head=4, vocab_size=D_VOCAB, initializer_range=0.2, **SPECIAL),
    "lfm2": Lfm2Config(**SIZES, num_key_value_heads=2, layer_types=["conv", "full_attention", "conv"], **LONG),
    "granite": GraniteConfig(**SIZES, num_key_value_heads=2, residual_multiplier=0.3, **LONG),
}
NATIVE = {
    "n_layers": 2,
    "d_model": 32,
    "n_heads": 4,
    "d_head": 8,
    "n_ctx": N_CTX,
    "d_vocab": D_VOCAB,
    "normalization_type": "LN",
    "act_fn": "relu",
    "seed": 0,
}
NATIVE_FIELDS = {
    "native_attn_only": {**NATIVE, "attn_only": True, "positional_embedding_type": "rotary"},
    "native_mlp": {**NATIVE, "d_mlp": 48, "positional_embedding_type": "standard"},
}
ARCHITECTURES = ["gpt2", "neox", "llama_gqa", "gemma2", "qwen3", "native_attn_only", "native_mlp"]


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Make a real tokenizer of D_VOCAB words w0, w1, …; the first is BOS."""
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(D_VOCAB)}, unk_token="w3"))
    return PreTrainedTokenizerFast(tokenizer_object=words, bos_token="w0", eos_token="w1", pad_token="w2")


def make_model(name: str) -> Model:
    """Build the tiny model of this name, always with the same weights."""
    torch.manual_seed(7)
    if name in NATIVE_FIELDS:
        module = native_module(NATIVE_FIELDS[name])
        with torch.no_grad():
            for weight in module.parameters():
                if weight.ndim > 1:
                    weight.mul_(3.0)
        return wrap_native(module)
    return wrap_hf_model(AutoModelForCausalLM.from_config(HF_CONFIGS[name]), word_tokenizer(), name)


@pytest.fixture(scope="session")
def models() -> dict[str, Model]:
    return {}


@pytest.fixture(params=ARCHITECTURES)
def model(request, models) -> Model:
    if request.param not in models:
        models[request.param] = make_model(request.param)
    return models[request.param]
