"""BatchTopK: z keeps the k * batch largest of ReLU(pre) over a whole batch; a threshold replaces that afterwards.

Bussmann, Leask and Nanda, "BatchTopK sparse autoencoders", 2024. After training z_j = pre_j [pre_j > θ], θ the running
mean of `threshold_mean`. Loss: Σ‖x - x̂‖² / (batch * d_out) + AuxK.
"""

from dataclasses import replace

import torch
from torch import Tensor

from mi_pipe.saes.architectures.base import Architecture
from mi_pipe.saes.architectures.k_schedule import KSchedule
from mi_pipe.saes.architectures.threshold_mean import ThresholdMean
from mi_pipe.saes.auxk import AuxK
from mi_pipe.saes.batch_selection import BatchSelection
from mi_pipe.saes.code import SparseCode
from mi_pipe.saes.inference import InferenceRule
from mi_pipe.saes.parameters import Parameters
from mi_pipe.saes.step import Batch, Outcome, StepContext, encoded_chunks, exact_values, selected_outcome


def select_over_batch(
    params: Parameters, inputs: Tensor, k: int, context: StepContext
) -> tuple[SparseCode, AuxK, Tensor]:
    """Return the k * batch largest positive entries of a batch, AuxK's view of it, and the smallest value kept."""
    selection, aux = BatchSelection(inputs.shape[0], params.d_sae, k * inputs.shape[0]), context.aux(params)
    for _, pre in encoded_chunks(params, inputs, context):
        selection.add(pre)
        aux.add(pre)
    code = exact_values(selection.code(), inputs, params, context)
    code = code.with_values(code.values.relu())
    active = code.values[code.values > 0]
    return code, aux, active.min() if active.shape[0] else code.values.new_tensor(torch.inf)


class BatchTopK(Architecture):
    """Keeps k features a row on average."""

    def __init__(self, k: int | KSchedule, n_steps: int) -> None:
        """Keep `k` a row; `n_steps` is the length of the training."""
        self._k = k if isinstance(k, KSchedule) else KSchedule(k)
        self.threshold = ThresholdMean(n_steps)

    def outcome(self, params: Parameters, batch: Batch, context: StepContext) -> Outcome:
        """Return losses and gradients of a batch."""
        inputs = params.centred(batch.x)
        k = min(self._k.at(context.step, context.n_steps), params.d_sae)
        code, aux, smallest = select_over_batch(params, inputs, k, context)
        outcome = selected_outcome(params, batch, inputs, code, aux)
        return replace(outcome, noted={"smallest": smallest})

    def observe(self, outcome: Outcome, n_rows: int) -> None:
        """Add the smallest activation to the running mean."""
        del n_rows
        self.threshold.observe(outcome.noted["smallest"])

    def figures(self) -> dict[str, float]:
        """Return the threshold."""
        return {"threshold": float(self.threshold.value)}

    def state(self) -> dict[str, Tensor]:
        """Return the running mean."""
        return self.threshold.state()

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Go on from a checkpoint's state."""
        self.threshold.load_state(state)

    def rule(self, params: Parameters) -> InferenceRule:
        """Keep what exceeds the threshold."""
        return InferenceRule("threshold", k=min(self._k.k, params.d_sae), threshold=self.threshold.value)
