"""Standard: z = ReLU(pre) with an L1 penalty weighed by the norms of the decoder's rows.

Bricken et al., "Towards monosemanticity", 2023; the norms: Conerly et al., "Update on how we train SAEs", April 2024.
loss = (Σ‖x - x̂‖² + λ Σ z_j ‖W_dec,j‖) / (batch * d_out) + AuxK. Decoder rows are free: shrinking z while W_dec grows
gains nothing. In a crosscoder ‖W_dec,j‖ is the sum of the norms at the hook points. Saved SAEs have the norms folded
into the encoder, so that their rows are unit vectors too.
"""

from typing import ClassVar

import torch
from torch import Tensor

from mi_pipe.saes.architectures.base import Architecture
from mi_pipe.saes.architectures.coefficient import Coefficient, Sparsity
from mi_pipe.saes.architectures.first_batch import bound_for
from mi_pipe.saes.architectures.relu_penalty import penalised_outcome
from mi_pipe.saes.inference import InferenceRule
from mi_pipe.saes.parameters import Parameters
from mi_pipe.saes.step import Batch, Outcome, StepContext

START_FACTOR = 3
"""How many times the target's features are active at first."""
_COEFFICIENT_A_BOUND = 0.7
"""Where a coefficient begins that is led, a unit of the pre-activation that the target's features exceed at first.

What L1 takes from each activation is in proportion to the coefficient, so it has to be of their order.
"""


def l1(z: Tensor) -> tuple[Tensor, Tensor]:
    """Return |z| and its slope for z ≥ 0."""
    return z, torch.ones_like(z)


class Penalised(Architecture):
    """An architecture with a sparsity penalty, and a coefficient that may be led to a target."""

    first_coefficient: ClassVar[float] = 3.0
    """Where a coefficient begins that is led and that no first batch has set."""

    def __init__(self, sparsity: Sparsity) -> None:
        """Become as sparse as `sparsity` says."""
        self.sparsity = sparsity
        self.coefficient = Coefficient(sparsity, self.first_coefficient)

    def prepare(self, params: Parameters, batch: Batch) -> None:
        """Let some times the target's features be active at first, by the encoder's bias; begin the coefficient."""
        target = self.sparsity.target_l0
        if target is not None:
            self.coefficient.begin(_COEFFICIENT_A_BOUND * bound_for(params, batch, target))
            params.b_enc.fill_(-bound_for(params, batch, START_FACTOR * target))

    def observe(self, outcome: Outcome, n_rows: int) -> None:
        """Let the coefficient follow."""
        self.coefficient.observe(int(outcome.n_active) / n_rows)

    def figures(self) -> dict[str, float]:
        """Return the coefficient as it is now."""
        return {"coefficient": self.coefficient.at(1 << 62)}

    def state(self) -> dict[str, Tensor]:
        """Return the coefficient."""
        return self.coefficient.state()

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Go on from a checkpoint's state."""
        self.coefficient.load_state(state)

    def rule(self, params: Parameters) -> InferenceRule:
        """Keep what is above 0."""
        target = self.sparsity.target_l0
        zero = torch.zeros((), dtype=params.b_enc.dtype, device=params.device)
        return InferenceRule("threshold", k=None if target is None else round(target), threshold=zero)


class Standard(Penalised):
    """ReLU and L1."""

    has_unit_decoder = False

    def __init__(self, sparsity: Sparsity, widths: tuple[int, ...] = ()) -> None:
        """Weigh a feature by its decoder row's norm, or by the sum of its norms at hook points of `widths`."""
        super().__init__(sparsity)
        self._widths = widths

    def outcome(self, params: Parameters, batch: Batch, context: StepContext) -> Outcome:
        """Return losses and gradients of a batch."""
        coefficient = self.coefficient.at(context.step)
        return penalised_outcome(params, batch, context, coefficient, l1, self._widths or (params.W_dec.shape[1],))
