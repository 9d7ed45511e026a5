"""Head scores by the diagonal definition, on random tokens written twice.

For A[b, query, key], tokens of period n and length 2 n, without BOS (TransformerLens' Main Demo; Olsson et al.
2022): a score is the mean over sequences and over one diagonal, query - key = lag, of the pattern:
previous_token lag 1, duplicate_token lag n, induction lag n - 1 (the token after the earlier occurrence).
These are not the scores of TransformerLens' `detect_head`, which divides by all attention.

Further, over all queries: attention_entropy, the mean of -sum_k A ln A in nats; first_token_share, the mean of
A[query, 0] over the queries but the first, which has no choice.
"""

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

DIAGONAL_SCORES = ("previous_token", "duplicate_token", "induction")
SCORES = (*DIAGONAL_SCORES, "attention_entropy", "first_token_share")


def diagonal_mean(pattern: Float[Tensor, "batch head query key"], lag: int) -> Float[Tensor, "batch head"]:
    """Return the mean attention to the position `lag` before, over the queries that have one; float64."""
    return pattern.diagonal(-lag, dim1=-2, dim2=-1).double().mean(-1)


def pattern_entropy(pattern: Float[Tensor, "batch head query key"]) -> Float[Tensor, "batch head"]:
    """Return the mean entropy of the rows, in nats, float64; 0 ln 0 is 0."""
    return torch.special.entr(pattern.double()).sum(-1).mean(-1)


def pattern_scores(pattern: Float[Tensor, "batch head query key"], period: int) -> Float[Tensor, "batch head score"]:
    """Return all scores of each sequence and head, in the order of SCORES, float64.

    All sequences have the same length, so the mean over them is the mean over all entries of a diagonal.
    """
    columns = [
        diagonal_mean(pattern, 1),
        diagonal_mean(pattern, period),
        diagonal_mean(pattern, period - 1),
        pattern_entropy(pattern),
        pattern[:, :, 1:, 0].double().mean(-1),
    ]
    return torch.stack(columns, dim=-1)


def score_table(scores: Float[np.ndarray, "layer head score"]) -> pd.DataFrame:
    """Return one row a head: `layer`, `head` (int32) and a float32 column a score."""
    n_layers, n_heads, _ = scores.shape
    layer, head = (axis.ravel().astype(np.int32) for axis in np.indices((n_layers, n_heads)))
    columns = {name: scores[:, :, i].ravel().astype(np.float32) for i, name in enumerate(SCORES)}
    return pd.DataFrame({"layer": layer, "head": head, **columns})
