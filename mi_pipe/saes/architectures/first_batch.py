"""Where selection begins: a bound that a chosen number of features a row exceed in the first batch.

With tied unit rows and zero biases half of all features would be active at first, and a threshold at 0 would have a
long way to go at Adam's pace of one learning rate a step: after short trainings it has not moved (the commonest failure
of JumpReLU SAEs). Beginning near the number of features that is wanted spares both.
"""

import torch

from mi_pipe.saes.batch_selection import top_k_flat
from mi_pipe.saes.kernels import pre_activations
from mi_pipe.saes.parameters import Parameters
from mi_pipe.saes.step import Batch

_N_ROWS = 512


def bound_for(params: Parameters, batch: Batch, l0: float) -> float:
    """Return the pre-activation that `l0` features a row exceed on average in the first rows of a batch, at least 0."""
    x = batch.x[:_N_ROWS]
    pre = pre_activations(params.centred(x), params.W_enc, torch.zeros_like(params.b_enc), "float32")
    _, values = top_k_flat(pre, max(1, round(l0 * x.shape[0])))
    return float(values.min()) if values.shape[0] else 0.0
