"""The step that ReLU architectures share: z = ReLU(pre), and a penalty on each activation.

loss = (Σ‖x - x̂‖² + λ Σ f(z_j) w_j) / (batch * d_out) + AuxK, with w_j = ‖W_dec,j‖ or 1.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from mi_pipe.saes.entries import backward, decode, entries_above, of_feature, products_at, sums_by_feature
from mi_pipe.saes.parameters import Parameters
from mi_pipe.saes.step import Batch, ChunkSums, Outcome, StepContext, encoded_chunks, exact_values, with_skip

Penalty = Callable[[Tensor], tuple[Tensor, Tensor]]
"""f: activations to (values, slopes); f(0) = 0."""


def penalised_outcome(
    params: Parameters, batch: Batch, context: StepContext, coefficient: float, penalty: Penalty, by_norm: bool
) -> Outcome:
    """Return losses and gradients of a batch; `by_norm` weighs a feature's penalty by its decoder row's norm."""
    inputs, aux = params.centred(batch.x), context.aux(params)
    sums, n = ChunkSums(params, batch, inputs, aux), batch.target.numel()
    norms = torch.linalg.vector_norm(params.W_dec, dim=1) if by_norm else torch.ones_like(params.b_enc)
    total = torch.zeros_like(params.b_enc)
    for rows, pre in encoded_chunks(params, inputs, context):
        aux.add(pre)
        part = sums.part(rows)
        code = exact_values(entries_above(pre, 0.0), inputs[rows], params, context)
        code = code.with_values(code.values.relu())
        difference = with_skip(params, part, decode(code, params.W_dec)).sub_(part.target)
        grad = difference * (2 / n)
        values, slopes = penalty(code.values)
        slopes = products_at(code, grad, params.W_dec) + slopes * of_feature(code, norms * (coefficient / n))
        found = backward(params, code, slopes * (code.values > 0), inputs[rows], grad)
        sums.add(code, difference, grad, found, rows)
        total += sums_by_feature(code, values)
    if by_norm:
        sums.gradients.W_dec += (total * (coefficient / n) / norms)[:, None] * params.W_dec
    return sums.outcome({"sparsity": (total * norms).sum() * (coefficient / n)})
