"""The step that ReLU architectures share: z = ReLU(pre), and a penalty on each activation.

loss = (Σ‖x - x̂‖² + λ Σ f(z_j) w_j) / (batch * d_out) + AuxK, with w_j = 1 or the norm of feature j's decoder row; in
a crosscoder the sum of its norms at the hook points (Lindsey et al., "Sparse crosscoders for cross-layer features and
model diffing", 2024), by which a feature of one hook point alone costs no more than it would in an SAE.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mi_pipe.saes.entries import backward, decode, entries_above, of_feature, products_at, sums_by_feature
from mi_pipe.saes.parameters import Parameters
from mi_pipe.saes.step import Batch, ChunkSums, Outcome, StepContext, encoded_chunks, exact_values, with_skip

Penalty = Callable[[Tensor], tuple[Tensor, Tensor]]
"""f: activations to (values, slopes); f(0) = 0."""


def penalised_outcome(
    params: Parameters,
    batch: Batch,
    context: StepContext,
    coefficient: float,
    penalty: Penalty,
    norm_widths: Sequence[int] = (),
) -> Outcome:
    """Return losses and gradients of a batch.

    Where `norm_widths` (of a decoder row's parts, which make up the row) are given, a feature's penalty is weighed by
    the sum of its parts' norms.
    """
    inputs, aux = params.centred(batch.x), context.aux(params)
    sums, n = ChunkSums(params, batch, inputs, aux), batch.target.numel()
    weights = _sum_of_norms(params.W_dec, norm_widths) if norm_widths else torch.ones_like(params.b_enc)
    total = torch.zeros_like(params.b_enc)
    for rows, pre in encoded_chunks(params, inputs, context):
        aux.add(pre)
        part = sums.part(rows)
        code = exact_values(entries_above(pre, 0.0), inputs[rows], params, context)
        code = code.with_values(code.values.relu())
        difference = with_skip(params, part, decode(code, params.W_dec)).sub_(part.target)
        grad = difference * (2 / n)
        values, slopes = penalty(code.values)
        slopes = products_at(code, grad, params.W_dec) + slopes * of_feature(code, weights * (coefficient / n))
        found = backward(params, code, slopes * (code.values > 0), inputs[rows], grad)
        sums.add(code, difference, grad, found, rows)
        total += sums_by_feature(code, values)
    if norm_widths:
        _add_slope_of_norms(sums.gradients.W_dec, params.W_dec, norm_widths, total * (coefficient / n))
    return sums.outcome({"sparsity": (total * weights).sum() * (coefficient / n)})


def _sum_of_norms(W_dec: Tensor, widths: Sequence[int]) -> Tensor:  # noqa: N803 (the field's name)
    norms = [torch.linalg.vector_norm(part, dim=1) for part in W_dec.split(list(widths), dim=1)]
    return norms[0] if len(norms) == 1 else torch.stack(norms).sum(0)


def _add_slope_of_norms(
    gradient: Tensor,
    W_dec: Tensor,  # noqa: N803
    widths: Sequence[int],
    by_weight: Tensor,
) -> None:
    """Add to the decoder's gradient what it gets through the weights, given the loss's slopes by them."""
    parts = zip(gradient.split(list(widths), dim=1), W_dec.split(list(widths), dim=1), strict=True)
    for part_gradient, part in parts:
        norms = torch.linalg.vector_norm(part, dim=1).clamp_min_(torch.finfo(part.dtype).tiny)
        part_gradient.addcmul_((by_weight / norms)[:, None], part)
