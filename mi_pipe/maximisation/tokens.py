"""Tokens near embeddings, and tokens that inputs may be made of."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mi_pipe.core.vocabulary import Vocabulary


def usable_tokens(vocabulary: Vocabulary, n_tokens: int) -> Bool[Tensor, " d_vocab"]:
    """Say which tokens inputs may be made of: all but marks such as BOS."""
    usable = torch.ones(n_tokens, dtype=torch.bool)
    special = [token for token in vocabulary.special_ids if token < n_tokens]
    usable[torch.tensor(special, dtype=torch.long)] = False
    return usable


def nearest_tokens(
    embeddings: Float[Tensor, "*batch d_model"],
    table: Float[Tensor, "d_vocab d_model"],
    usable: Bool[Tensor, " d_vocab"],
    n: int = 1,
) -> tuple[Float[Tensor, "*batch n"], Int[Tensor, "*batch n"]]:
    """Return the cosines and ids of the usable tokens nearest to each embedding, the nearest first."""
    cosines = torch.nn.functional.normalize(embeddings, dim=-1) @ torch.nn.functional.normalize(table, dim=-1).T
    found = cosines.masked_fill(~usable.to(cosines.device), -torch.inf).topk(n, dim=-1)
    return found.values, found.indices
