"""Matryoshka BatchTopK: each of several prefixes of the features must reconstruct the input by itself.

Bussmann, Nabeshima, Karvonen and Nanda, "Learning multi-level features with matryoshka sparse autoencoders", 2025. With
prefixes m_1 < … < m_G = d_sae and z selected by BatchTopK over all features,
loss = 1/G Σ_i Σ‖x - W_dec[:m_i]ᵀ z[:m_i] - b_dec‖² / (batch * d_out) + AuxK on the full error.

Reconstructions of prefixes are running sums over groups of features, so all of them cost one decode; an entry of group
g gets the gradient of every prefix that holds it: H_g = Σ_{i ≥ g} ∂loss/∂x̂_i.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mi_pipe.saes.architectures.batchtopk import BatchTopK, select_over_batch
from mi_pipe.saes.architectures.k_schedule import KSchedule
from mi_pipe.saes.code import SparseCode
from mi_pipe.saes.entries import backward
from mi_pipe.saes.kernels import decode, products_at
from mi_pipe.saes.parameters import Parameters
from mi_pipe.saes.step import Batch, Outcome, StepContext, add_aux, skip_gradient, with_skip

DEFAULT_FRACTIONS = (1 / 32, 3 / 32, 7 / 32, 15 / 32, 1.0)


def prefixes(d_sae: int, fractions: Sequence[float]) -> list[int]:
    """Return the prefixes' sizes: growing, distinct, the last one d_sae.

    >>> prefixes(64, (1 / 32, 0.25, 1.0))
    [2, 16, 64]
    """
    return sorted({max(1, min(d_sae, round(fraction * d_sae))) for fraction in fractions} | {d_sae})


class Matryoshka(BatchTopK):
    """BatchTopK whose first features are to do as much as they can alone."""

    def __init__(self, k: int | KSchedule, n_steps: int, fractions: Sequence[float] = DEFAULT_FRACTIONS) -> None:
        """Keep `k` a row; `fractions` of d_sae are the prefixes."""
        super().__init__(k, n_steps)
        self._fractions = tuple(fractions)

    def outcome(self, params: Parameters, batch: Batch, context: StepContext) -> Outcome:
        """Return losses and gradients of a batch."""
        inputs = params.centred(batch.x)
        k = min(self._k.at(context.step, context.n_steps), params.d_sae)
        code, aux, smallest = select_over_batch(params, inputs, k, context)
        ends = prefixes(params.d_sae, self._fractions)
        groups = [_Group(params, code, start, end) for start, end in zip([0, *ends], ends, strict=False)]
        errors = _prefix_errors(params, batch, groups)
        n, weight = batch.target.numel(), 1 / len(groups)
        squares = [torch.linalg.vector_norm(error).square() for error in errors]
        losses = {"reconstruction": torch.stack(squares).sum() * (weight / n)}
        gradients = _gradients(groups, inputs, [error * (2 * weight / n) for error in errors], batch, params)
        add_aux(losses, gradients, aux, params, inputs, errors[-1])
        return Outcome(
            losses, errors[-1], squares[-1], code.n_active(), code.n_fired(), gradients, {"smallest": smallest}
        )


class _Group:
    """The features between two prefixes: their part of the code and of the weights."""

    def __init__(self, params: Parameters, code: SparseCode, start: int, end: int) -> None:
        is_here = (code.features >= start) & (code.features < end)
        starts = torch.zeros(code.n_rows + 1, dtype=torch.int32, device=code.features.device)
        starts[1:] = torch.bincount(code.entry_rows()[is_here], minlength=code.n_rows).cumsum(0)
        self.code = SparseCode(starts, code.features[is_here] - start, code.values[is_here], end - start)
        self.params = replace(
            params, W_enc=params.W_enc[start:end], W_dec=params.W_dec[start:end], b_enc=params.b_enc[start:end]
        )


def _prefix_errors(params: Parameters, batch: Batch, groups: list[_Group]) -> list[Tensor]:
    """Return x̂_i - x for each prefix."""
    zero = torch.zeros_like(batch.target)
    error = with_skip(params, batch, zero).sub_(batch.target)
    errors = []
    for group in groups:
        error = error + decode(group.code, group.params.W_dec)
        errors.append(error)
    return errors


def _gradients(
    groups: list[_Group], inputs: Tensor, grads: list[Tensor], batch: Batch, params: Parameters
) -> Parameters:
    """Return the gradients of all groups; biases and skip connection belong to every prefix."""
    parts: list[Parameters] = []
    total = torch.zeros_like(grads[0])
    for group, grad in zip(reversed(groups), reversed(grads), strict=True):
        total = total + grad
        delta = products_at(group.code, total, group.params.W_dec) * (group.code.values > 0)
        parts.append(backward(group.params, group.code, delta, inputs, total, decoder_bias=False))
    parts.reverse()
    b_dec = torch.stack([part.b_dec for part in parts]).sum(0) + total.sum(0)
    stacked = {name: torch.cat([getattr(part, name) for part in parts]) for name in ("W_enc", "W_dec", "b_enc")}
    gradients = Parameters(**stacked, b_dec=b_dec, subtract_b_dec=params.subtract_b_dec)
    skip_gradient(params, batch, total, gradients)
    return gradients
