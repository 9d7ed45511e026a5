"""Tiny random models of each supported layout, and pairs of prompts; weights large enough for sharp attention."""

from functools import cache

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    FalconConfig,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    OPTConfig,
    PhiConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from mi_pipe.circuits.recording import Pairs
from mi_pipe.models.loading import wrap_hf_model
from mi_pipe.models.model import Model
from mi_pipe.models.trained import native_module, wrap_native

D_VOCAB = 41
N_CTX = 16
SIZES = {"vocab_size": D_VOCAB, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
MORE = {"intermediate_size": 40, "initializer_range": 0.25, "max_position_embeddings": N_CTX, "bos_token_id": 0}
MORE |= {"eos_token_id": 1, "pad_token_id": 2}
GPT = {"vocab_size": D_VOCAB, "n_layer": 2, "n_embd": 24, "n_head": 4, "n_positions": N_CTX, "initializer_range": 0.25}
GPT |= {"bos_token_id": 0, "eos_token_id": 1}
HF_CONFIGS = {
    "gpt2": GPT2Config(**GPT),
    "neox": GPTNeoXConfig(**SIZES, **MORE),
    "llama_gqa": LlamaConfig(**SIZES, num_key_value_heads=2, **MORE),
    "llama": LlamaConfig(**SIZES, num_key_value_heads=4, **MORE),
    "qwen3": Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=8, **MORE),
    "phi": PhiConfig(**SIZES | {"hidden_size": 32}, **MORE),
    "gemma2": Gemma2Config(**SIZES, num_key_value_heads=2, head_dim=8, **MORE),
    "cohere": CohereConfig(**SIZES, num_key_value_heads=2, logit_scale=0.25, **MORE),
    "granite": GraniteConfig(**SIZES, num_key_value_heads=2, logits_scaling=3.0, residual_multiplier=0.5, **MORE),
}
ODD_CONFIGS = {
    # Adds the attention's output to the MLP's in place.
    "falcon": FalconConfig(**SIZES, parallel_attn=True, multi_query=True, bias=False, initializer_range=0.25),
    # Its MLPs know no batch: their values are (pair * pos, width).
    "opt": OPTConfig(**SIZES, ffn_dim=40, word_embed_proj_dim=24, init_std=0.25, max_position_embeddings=N_CTX),
}
NATIVE = {"n_layers": 2, "d_model": 24, "n_heads": 4, "d_head": 6, "n_ctx": N_CTX, "d_vocab": D_VOCAB, "seed": 3}
NATIVE |= {"act_fn": "gelu", "initializer_range": 0.25}
NATIVE_FIELDS = {
    "native": NATIVE | {"normalization_type": "LN", "d_mlp": 40, "positional_embedding_type": "standard"},
    "native_attn_only": NATIVE | {"normalization_type": "LN", "attn_only": True, "positional_embedding_type": "rotary"},
    "native_no_norm": NATIVE | {"normalization_type": None, "attn_only": True, "positional_embedding_type": "rotary"},
}
REFERENCED = ["gpt2", "neox", "llama_gqa", "native", "native_attn_only"]
SUPPORTED = [*REFERENCED, "qwen3", "phi", "native_no_norm"]


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(D_VOCAB)}, unk_token="w3"))
    return PreTrainedTokenizerFast(tokenizer_object=words, bos_token="w0", eos_token="w1", pad_token="w2")


@cache
def model(name: str) -> Model:
    """Build the tiny model of this name in float64, once."""
    torch.manual_seed(5)
    if name in NATIVE_FIELDS:
        module = native_module(NATIVE_FIELDS[name])
        wrapped = wrap_native(module)
    else:
        module = AutoModelForCausalLM.from_config((HF_CONFIGS | ODD_CONFIGS)[name])
        wrapped = wrap_hf_model(module, tokenizer(), name)
    with torch.no_grad():
        for weight in wrapped.module.parameters():
            if weight.ndim == 1:
                weight.add_(0.1 * torch.randn_like(weight))
            elif name in NATIVE_FIELDS:
                weight.mul_(6.0 if weight.std() < 0.1 else 1.0)
    wrapped.module.double()
    return wrapped


def pairs(n_pairs: int = 3, n_pos: int = 6, seed: int = 0) -> Pairs:
    """Random pairs that differ in two positions."""
    draw = torch.Generator().manual_seed(seed)
    clean = torch.randint(3, D_VOCAB, (n_pairs, n_pos), generator=draw)
    corrupted = clean.clone()
    corrupted[:, 1] = torch.randint(3, D_VOCAB, (n_pairs,), generator=draw)
    corrupted[:, 3] = torch.randint(3, D_VOCAB, (n_pairs,), generator=draw)
    answer = torch.randint(3, D_VOCAB, (n_pairs,), generator=draw)
    return Pairs(clean, corrupted, answer, (answer + 1) % D_VOCAB)
