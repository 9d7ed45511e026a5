"""Made-up activations: sparse sums of random directions about a mean, with a little noise."""

import torch
from jaxtyping import Float
from torch import Tensor

_N_DIRECTIONS_A_DIM = 4
_N_ACTIVE = 24
_NOISE = 0.05
_BLOCK_ROWS = 4096


def mixture(n_rows: int, d_in: int, seed: int = 0) -> Float[Tensor, "row d_in"]:
    """Return rows that are sums of 24 of 4 * d_in unit directions with exponential strengths, plus mean and noise."""
    random = torch.Generator().manual_seed(seed)
    directions = torch.randn(_N_DIRECTIONS_A_DIM * d_in, d_in, generator=random)
    directions = torch.nn.functional.normalize(directions, dim=1)
    mean = torch.randn(d_in, generator=random) / d_in**0.5
    rows = torch.empty(n_rows, d_in)
    for part in rows.split(_BLOCK_ROWS):
        chosen = torch.randint(len(directions), (len(part), _N_ACTIVE), generator=random)
        strengths = torch.empty(len(part), _N_ACTIVE).exponential_(generator=random)
        part.copy_(torch.nn.functional.embedding_bag(chosen, directions, per_sample_weights=strengths, mode="sum"))
        part += mean + _NOISE * torch.randn(part.shape, generator=random)
    return rows
