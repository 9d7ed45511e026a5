"""A small random SAE for targets."""

import torch

from mi_pipe.saes.inference import InferenceRule
from mi_pipe.saes.sae import SAE


def random_sae(hook: str, d_in: int = 32, d_sae: int = 24, k: int = 4, seed: int = 0) -> SAE:
    """Return a TopK SAE with random weights that reads `hook`."""
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(shape, generator=generator) for shape in ((d_in, d_sae), (d_sae,), (d_sae, d_in), (d_in,))]
    return SAE(*weights, InferenceRule("topk", k=k), hook=hook, name="random")
