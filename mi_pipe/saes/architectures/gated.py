"""Gated: one encoder decides what is active, a rescaled copy how strongly, so that sparsity shrinks no magnitudes.

Rajamanoharan et al., "Improving dictionary learning with gated sparse autoencoders", 2024, equations 6 to 8.
h = W_enc (x - b_dec), π = h + b_gate, m = ReLU(exp(r) h + b_mag), z = 1[π > 0] m, and
loss = (Σ‖x - x̂‖² + λ Σ ReLU(π_j) + Σ‖x - W_decᵀ ReLU(π) - b_dec‖²) / (batch * d_out) + AuxK with unit decoder rows,
W_dec and b_dec held constant in the third part. `b_enc` is b_gate.
"""

import torch
from torch import Tensor

from mi_pipe.saes.architectures.standard import Penalised
from mi_pipe.saes.entries import Code, backward, decode, entries_above, of_feature, products_at, sums_by_feature
from mi_pipe.saes.inference import InferenceRule
from mi_pipe.saes.parameters import Parameters
from mi_pipe.saes.step import Batch, ChunkSums, Outcome, StepContext, encoded_chunks, exact_values, with_skip


class Gated(Penalised):
    """A gate and a magnitude for each feature."""

    def outcome(self, params: Parameters, batch: Batch, context: StepContext) -> Outcome:
        """Return losses and gradients of a batch."""
        inputs, aux = params.centred(batch.x), context.aux(params)
        sums, n = ChunkSums(params, batch, inputs, aux), batch.target.numel()
        coefficient = self.coefficient.at(context.step)
        gate_sum, gate_error = (torch.zeros((), dtype=batch.x.dtype, device=params.device) for _ in range(2))
        for rows, pre in encoded_chunks(params, inputs, context):
            aux.add(pre)
            gate = exact_values(entries_above(pre, 0.0), inputs[rows], params, context)
            gate_sum += gate.values.sum()
            gate_error += _add_chunk(params, sums, inputs[rows], gate, rows, n, coefficient)
        return sums.outcome({"sparsity": gate_sum * (coefficient / n), "gate": gate_error / n})

    def rule(self, params: Parameters) -> InferenceRule:
        """Gate, then magnitude."""
        target = self.sparsity.target_l0
        k = None if target is None else round(target)
        return InferenceRule("gated", k=k, r_mag=params.r_mag, b_mag=params.b_mag)


def _add_chunk(
    params: Parameters, sums: ChunkSums, inputs: Tensor, gate: Code, rows: slice, n: int, coefficient: float
) -> Tensor:
    """Add the gradients of some rows, and return the gate's squared error; `gate` has π where π > 0."""
    assert params.r_mag is not None, "a gated SAE has it"
    assert params.b_mag is not None, "a gated SAE has it"
    part, stretch = sums.part(rows), of_feature(gate, params.r_mag.exp())
    h = gate.values - of_feature(gate, params.b_enc)
    code = gate.with_values((stretch * h + of_feature(gate, params.b_mag)).relu())
    difference = with_skip(params, part, decode(code, params.W_dec)).sub_(part.target)
    gate_difference = with_skip(params, part, decode(gate, params.W_dec)).sub_(part.target)
    grad = difference * (2 / n)
    magnitude = products_at(code, grad, params.W_dec) * (code.values > 0)
    opening = (products_at(gate, gate_difference * (2 / n), params.W_dec) + coefficient / n) * (gate.values > 0)
    found = backward(params, code, opening + magnitude * stretch, inputs, grad)
    found.b_enc = sums_by_feature(gate, opening)
    found.b_mag = sums_by_feature(code, magnitude)
    found.r_mag = sums_by_feature(code, magnitude * stretch * h)
    sums.add(code, difference, grad, found, rows)
    return torch.linalg.vector_norm(gate_difference).square()
