"""The random GPT-2-like model and the random pairs of prompts that both libraries patch."""

from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import Tokenizer, models
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from mi_pipe.models.loading import wrap_hf_model
from mi_pipe.models.model import Model
from mi_pipe.prompts.prompt_set import PairGroup


@dataclass(frozen=True)
class Sizes:
    """Sizes of the model and of the prompts."""

    n_layers: int = 12
    d_model: int = 256
    n_heads: int = 8
    d_vocab: int = 50_257
    n_pairs: int = 16
    n_pos: int = 16


def random_model(sizes: Sizes) -> Model:
    """Make the model, always with the same weights."""
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=sizes.n_layers,
        n_embd=sizes.d_model,
        n_head=sizes.n_heads,
        vocab_size=sizes.d_vocab,
        n_positions=4 * sizes.n_pos,
        bos_token_id=0,
        eos_token_id=0,
    )
    words = Tokenizer(models.WordLevel({"<s>": 0}, unk_token="<s>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="<s>", unk_token="<s>")
    return wrap_hf_model(GPT2LMHeadModel(config), tokenizer, "gpt2-like")


def random_pairs(sizes: Sizes, n_shared: int) -> PairGroup:
    """Make pairs of random prompts that are equal up to position `n_shared` and differ there."""
    random = torch.Generator().manual_seed(1)
    clean, corrupted = torch.randint(1, sizes.d_vocab, (2, sizes.n_pairs, sizes.n_pos), generator=random)
    corrupted[:, :n_shared] = clean[:, :n_shared]
    answer, wrong = torch.randint(1, sizes.d_vocab, (2, sizes.n_pairs), generator=random)
    return PairGroup(np.arange(sizes.n_pairs), clean, corrupted, answer, wrong, [])
