"""TopK: z = ReLU(TopK_k(pre)), the k largest pre-activations of each row.

Gao et al., "Scaling and evaluating sparse autoencoders", 2024, section 2.3. The same rule holds in training
and after it. Loss: Σ‖x - x̂‖² / (batch * d_out) + AuxK.
"""

import torch

from mi_pipe.saes.architectures.base import Architecture
from mi_pipe.saes.architectures.k_schedule import KSchedule
from mi_pipe.saes.code import SparseCode
from mi_pipe.saes.inference import InferenceRule
from mi_pipe.saes.parameters import Parameters
from mi_pipe.saes.selection import top_k_rows
from mi_pipe.saes.step import Batch, Outcome, StepContext, encoded_chunks, exact_values, selected_outcome


class TopK(Architecture):
    """Keeps k features a row."""

    def __init__(self, k: int | KSchedule) -> None:
        """Keep the `k` largest."""
        self._k = k if isinstance(k, KSchedule) else KSchedule(k)

    def outcome(self, params: Parameters, batch: Batch, context: StepContext) -> Outcome:
        """Return losses and gradients of a batch; those at or below 0 of the k largest have the value 0."""
        k = min(self._k.at(context.step, context.n_steps), params.d_sae)
        inputs, aux = params.centred(batch.x), context.aux(params)
        features, values = [], []
        for _, pre in encoded_chunks(params, inputs, context):
            kept = top_k_rows(pre, k)
            values.append(kept[0])
            features.append(kept[1])
            aux.add(pre)
        code = SparseCode.from_rows(torch.cat(features), torch.cat(values), params.d_sae)
        code = exact_values(code, inputs, params, context)
        return selected_outcome(params, batch, inputs, code.with_values(code.values.relu()), aux)

    def rule(self, params: Parameters) -> InferenceRule:
        """Keep the k largest."""
        return InferenceRule("topk", k=min(self._k.k, params.d_sae))
