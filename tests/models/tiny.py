"""Tiny real models and a tiny real tokenizer, made on the spot."""

import string
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPACE = "\u0120"
TOY_FIELDS = {
    "d_model": 32,
    "d_head": 8,
    "n_layers": 2,
    "n_ctx": 64,
    "n_heads": 4,
    "d_vocab": 64,
    "attn_only": True,
    "positional_embedding_type": "rotary",
    "normalization_type": "LN",
    "seed": 0,
}


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer whose words are single letters with and without a leading space."""
    letters = string.ascii_lowercase
    pieces = ["<s>", *letters, *(SPACE + letter for letter in letters), SPACE]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [(SPACE, letter) for letter in letters]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="<s>")


def save_tiny_llama(folder: Path, seed: int = 0) -> Path:
    """Save a random two-layer Llama with grouped queries, and the tiny tokenizer, in HuggingFace layout."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
