"""What an architecture adds to the common sparse autoencoder: how features are selected, in training and after.

All share x̂ = W_decᵀ z + b_dec with z a selection of ReLU(W_enc (x - b_dec) + b_enc). An architecture is a file
with a class that follows the protocol below, named in `ARCHITECTURES`.
"""

from dataclasses import dataclass
from typing import Literal, Protocol

from jaxtyping import Float
from torch import Tensor

from mi_pipe.saes.code import SparseCode

ArchitectureName = Literal["topk", "batchtopk"]


@dataclass(frozen=True)
class InferenceRule:
    """How a trained SAE selects features: `topk` keeps the k largest above 0, `threshold` all above a threshold."""

    kind: Literal["topk", "threshold"]
    k: int | None = None
    threshold: Float[Tensor, ""] | None = None


class Architecture(Protocol):
    """Selects the active features of a batch and keeps what selection needs from batch to batch."""

    def select(self, pre: Float[Tensor, "batch d_sae"]) -> SparseCode:
        """Return the active features of a training batch."""
        ...

    def observe(self, code: SparseCode) -> None:
        """Take note of a training batch's final code."""
        ...

    def state(self) -> dict[str, Tensor]:
        """Return what a checkpoint must hold."""
        ...

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Go on from a checkpoint's state."""
        ...

    def rule(self) -> InferenceRule:
        """Return how to select after training, thresholds in the normalised space."""
        ...
