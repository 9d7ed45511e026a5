"""A random GPT-2-like model and its tokenizer on disk, where mi_pipe, TransformerLens and SAELens all find them."""

import string
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

_COMMIT = "0" * 40
_HUB_NAME = "gpt2"


@dataclass(frozen=True)
class Sizes:
    """Sizes of the model; by default GPT-2 small's, with fewer layers and tokens."""

    n_layers: int = 6
    d_model: int = 768
    n_heads: int = 12
    d_vocab: int = 5000
    n_ctx: int = 128


def save_model(home: Path, sizes: Sizes) -> Path:
    """Save the model as the commit of `gpt2` that a HuggingFace cache below `home` holds; return its folder.

    With HF_HOME=home and HF_HUB_OFFLINE=1 every library loads it as `gpt2`, so that peers which know models by name
    alone can be measured without a network.
    """
    cache = home / "hub" / f"models--{_HUB_NAME}"
    folder = cache / "snapshots" / _COMMIT
    folder.mkdir(parents=True)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(_COMMIT)
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=sizes.n_layers,
        n_embd=sizes.d_model,
        n_head=sizes.n_heads,
        vocab_size=sizes.d_vocab,
        n_positions=sizes.n_ctx,
        n_ctx=sizes.n_ctx,  # as in the real gpt2; TransformerLens reads it
        bos_token_id=0,
        eos_token_id=0,
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    _tokenizer(sizes.d_vocab).save_pretrained(folder)
    return folder


def _tokenizer(d_vocab: int) -> PreTrainedTokenizerFast:
    """Return a tokenizer of `d_vocab` words; prompts are made of token ids, so nothing is ever encoded."""
    words = ["<|endoftext|>", *string.ascii_lowercase]
    vocabulary = {word: i for i, word in enumerate([*words, *(f"w{i}" for i in range(d_vocab - len(words)))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<|endoftext|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    mark = "<|endoftext|>"
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=mark, eos_token=mark, unk_token=mark)
