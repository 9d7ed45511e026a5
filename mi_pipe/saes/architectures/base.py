"""What an architecture is: the loss of a batch with its gradients, and what it remembers from batch to batch.

All share pre = W_enc u + b_enc, u = x - b_dec (a transcoder: u = x), and x̂ = W_decᵀ z + b_dec. They differ in how z
comes from pre, and in what the loss adds to the reconstruction error. `sweep.build` makes one by name.
"""

from typing import ClassVar, Literal

from torch import Tensor

from mi_pipe.saes.inference import InferenceRule
from mi_pipe.saes.parameters import Parameters
from mi_pipe.saes.step import Batch, Outcome, StepContext

ArchitectureName = Literal["standard", "topk", "batchtopk", "jumprelu", "gated", "matryoshka", "p_anneal"]


class Architecture:
    """The base of all; remembers nothing."""

    has_unit_decoder: ClassVar[bool] = True
    """Whether decoder rows are held at norm 1."""

    def prepare(self, params: Parameters, batch: Batch) -> None:
        """Set initial parameters that depend on the first batch, in place."""

    def outcome(self, params: Parameters, batch: Batch, context: StepContext) -> Outcome:
        """Return losses and gradients of a batch; changes nothing."""
        raise NotImplementedError

    def observe(self, outcome: Outcome, n_rows: int) -> None:
        """Take note of a step, after the parameters have moved."""

    def constrain(self, params: Parameters) -> None:
        """Bring parameters back to where they are allowed, in place, after they have moved."""

    def figures(self) -> dict[str, float]:
        """Return what the training curve should show beside losses: the coefficient as it is now, and the like."""
        return {}

    def state(self) -> dict[str, Tensor]:
        """Return what a checkpoint must hold, beside the parameters."""
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Go on from a checkpoint's state."""

    def rule(self, params: Parameters) -> InferenceRule:
        """Return how to select after training, in the normalised space."""
        raise NotImplementedError
