"""Resampling: dead features begin again at inputs that are reconstructed badly.

Bricken et al., "Towards monosemanticity", 2023, appendix on neuron resampling. Each dead feature draws a row of the
batch with probability proportional to the square of its squared error; its decoder row becomes that row of u = x -
b_dec (a transcoder: its target less b_dec) scaled to norm 1, its encoder row that of the input scaled to 0.2 of the
living features' mean norm, its bias 0. Its moments are forgotten. A threshold (JumpReLU) or gate keeps what it had.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from mi_pipe.saes.parameters import Parameters
from mi_pipe.saes.step import Batch

_ENCODER_SHARE = 0.2


def resample(
    params: Parameters,
    batch: Batch,
    dead: Int[Tensor, " dead"],
    squared_errors: Float[Tensor, " batch"],
    generator: torch.Generator,
) -> None:
    """Replace the weights of the features listed in `dead`, in place; `generator` (CPU) draws the rows."""
    weights = squared_errors.double().square().cpu()
    if dead.shape[0] == 0 or not float(weights.sum()) > 0:
        return
    rows = torch.multinomial(weights, dead.shape[0], replacement=True, generator=generator).to(params.device)
    is_living = torch.ones(params.d_sae, dtype=torch.bool, device=params.device)
    is_living[dead] = False
    norms = torch.linalg.vector_norm(params.W_enc, dim=1)
    norm = norms[is_living].mean() if bool(is_living.any()) else norms.mean()
    params.W_dec[dead] = functional.normalize(batch.target[rows] - params.b_dec, dim=1)
    params.W_enc[dead] = functional.normalize(params.centred(batch.x)[rows], dim=1) * (_ENCODER_SHARE * norm)
    params.b_enc[dead] = 0
