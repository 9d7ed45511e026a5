"""JumpReLU: z = pre · 1[pre > θ] with a trained threshold for each feature.

Rajamanoharan et al., "Jumping ahead: improving reconstruction fidelity with JumpReLU sparse autoencoders", 2024. θ is
kept as it is (not as its logarithm), in float32 and at least 0. The derivatives by θ are those of a rectangle of width
ε around the jump (section 3 and appendix): ∂z/∂θ = -(θ/ε) rect((pre - θ)/ε), ∂1[pre > θ]/∂θ = -(1/ε) rect((pre - θ)/ε),
and ∂z/∂pre = 1[pre > θ].

Penalties: `target`, λ (L0 / k - 1)² with L0 the batch's mean number of active features (appendix on training at a fixed
sparsity); `step`, λ Σ 1[z > 0] / (batch * d_out); `tanh`, λ Σ tanh(c z) / (batch * d_out) with c = 4 (Conerly et al.,
"Dictionary learning optimization techniques", January 2025). All with unit decoder rows and AuxK.

θ begins where the first batch has START_FACTOR times the target's features, and moves at THRESHOLD_LR times the others'
learning rate: it is of order 1 where weights are of order 1/√d. No derivative reaches the θ of a feature that has left
the window, so that features would only ever leave: a loss (2 / d_sae) Σ θ_j over the dead ones brings them back, in the
place of the pre-activation loss of Conerly et al.
"""

from typing import Literal

import torch
from torch import Tensor

from mi_pipe.saes.architectures.coefficient import Sparsity
from mi_pipe.saes.architectures.first_batch import bound_for
from mi_pipe.saes.architectures.standard import Penalised
from mi_pipe.saes.entries import Code, backward, decode, entries_above, of_feature, products_at, sums_by_feature
from mi_pipe.saes.inference import InferenceRule
from mi_pipe.saes.parameters import Parameters
from mi_pipe.saes.step import Batch, ChunkSums, Outcome, StepContext, encoded_chunks, exact_values, with_skip

SparsityLoss = Literal["target", "step", "tanh"]

START_FACTOR = 1
THRESHOLD_LR = 30.0
BANDWIDTH = 0.5
_TANH_SCALE = 4.0
_REVIVAL = 2.0
"""Weight of the mean threshold of dead features in the loss."""


class JumpReLU(Penalised):
    """A threshold for each feature."""

    def __init__(self, sparsity: Sparsity, loss: SparsityLoss = "target", bandwidth: float = BANDWIDTH) -> None:
        """Use a penalty by name; `bandwidth` is ε (normalised activations have variance 1 a dimension)."""
        super().__init__(sparsity)
        if loss == "target" and sparsity.target_l0 is None:
            raise ValueError("the loss `target` needs a target")
        self._loss: SparsityLoss = loss
        self._bandwidth = bandwidth

    def prepare(self, params: Parameters, batch: Batch) -> None:
        """Let some times the target's features be active at first, by their thresholds."""
        assert params.threshold is not None, "a JumpReLU SAE has thresholds"
        if self.sparsity.target_l0 is not None:
            params.threshold.fill_(bound_for(params, batch, START_FACTOR * self.sparsity.target_l0))

    def outcome(self, params: Parameters, batch: Batch, context: StepContext) -> Outcome:
        """Return losses and gradients of a batch."""
        assert params.threshold is not None, "a JumpReLU SAE has thresholds"
        inputs, aux = params.centred(batch.x), context.aux(params)
        sums = ChunkSums(params, batch, inputs, aux)
        bound = (params.threshold - self._bandwidth / 2).clamp_min(0)
        n_near = torch.zeros_like(params.b_enc)
        tanh_sum = torch.zeros((), dtype=batch.x.dtype, device=params.device)
        for rows, pre in encoded_chunks(params, inputs, context):
            aux.add(pre)
            entries = exact_values(entries_above(pre, bound), inputs[rows], params, context)
            near = self._near(entries, params.threshold)
            n_near += sums_by_feature(entries, near)
            code = self._add_chunk(params, sums, inputs[rows], entries, near, rows, batch.target.numel(), context)
            tanh_sum += torch.tanh(_TANH_SCALE * code.values).sum()
        sparsity, slope = self._sparsity(sums.n_active, tanh_sum, batch, context)
        assert sums.gradients.threshold is not None, "they have the parameters' tensors"
        sums.gradients.threshold -= n_near * (slope / self._bandwidth)
        penalties = {"sparsity": sparsity}
        if len(context.dead) and context.auxk_coefficient:
            sums.gradients.threshold[context.dead] += _REVIVAL / params.d_sae
            penalties["revival"] = params.threshold[context.dead].sum() * (_REVIVAL / params.d_sae)
        return sums.outcome(penalties)

    def constrain(self, params: Parameters) -> None:
        """Keep thresholds at or above 0."""
        assert params.threshold is not None, "a JumpReLU SAE has thresholds"
        params.threshold.clamp_min_(0)

    def observe(self, outcome: Outcome, n_rows: int) -> None:
        """Let the coefficient follow, unless the loss has the target in it."""
        if self._loss != "target":
            super().observe(outcome, n_rows)

    def rule(self, params: Parameters) -> InferenceRule:
        """Keep what exceeds its feature's threshold."""
        target = self.sparsity.target_l0
        return InferenceRule("threshold", k=None if target is None else round(target), threshold=params.threshold)

    def _near(self, entries: Code, threshold: Tensor) -> Tensor:
        """Return 1 for entries within ε/2 of their threshold, else 0, in the dtype of the activations."""
        distance = (entries.values - of_feature(entries, threshold)).abs()
        return ((distance < self._bandwidth / 2) & (entries.values > 0)).to(entries.values.dtype)

    def _add_chunk(
        self,
        params: Parameters,
        sums: ChunkSums,
        inputs: Tensor,
        entries: Code,
        near: Tensor,
        rows: slice,
        n: int,
        context: StepContext,
    ) -> Code:
        """Add the gradients of some rows, those of L0 left out, and return their code."""
        assert params.threshold is not None, "a JumpReLU SAE has thresholds"
        part = sums.part(rows)
        code = entries.with_values(entries.values * (entries.values > of_feature(entries, params.threshold)))
        difference = with_skip(params, part, decode(code, params.W_dec)).sub_(part.target)
        grad = difference * (2 / n)
        by_z = products_at(entries, grad, params.W_dec)
        if self._loss == "tanh":
            rise = 1 - torch.tanh(_TANH_SCALE * code.values).square()
            by_z = by_z + rise * (_TANH_SCALE * self.coefficient.at(context.step) / n)
        found = backward(params, code, by_z * (code.values > 0), inputs, grad)
        found.threshold = -sums_by_feature(entries, by_z * near) * (params.threshold / self._bandwidth)
        sums.add(code, difference, grad, found, rows)
        return code

    def _sparsity(self, n_active: Tensor, tanh_sum: Tensor, batch: Batch, context: StepContext) -> tuple[Tensor, float]:
        """Return the penalty, and its derivative by the number of active entries of the batch."""
        coefficient, n_rows = self.coefficient.at(context.step), batch.x.shape[0]
        if self._loss == "tanh":
            return tanh_sum * (coefficient / batch.target.numel()), 0.0
        if self._loss == "step":
            slope = coefficient / batch.target.numel()
            return n_active.to(batch.x.dtype) * slope, slope
        assert self.sparsity.target_l0 is not None, "checked when made"
        excess = float(n_active) / n_rows / self.sparsity.target_l0 - 1
        slope = 2 * coefficient * excess / (self.sparsity.target_l0 * n_rows)
        return batch.x.new_tensor(coefficient * excess**2), slope
