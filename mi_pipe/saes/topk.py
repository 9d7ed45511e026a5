"""TopK: z = ReLU(TopK_k(pre)), the k largest pre-activations of each row.

Gao et al., "Scaling and evaluating sparse autoencoders", 2024, section 2.3. The same rule holds in training
and after it.
"""

from jaxtyping import Float
from torch import Tensor

from mi_pipe.saes.architecture import InferenceRule
from mi_pipe.saes.code import SparseCode
from mi_pipe.saes.kernels import top_k_rows


class TopK:
    """Keeps k features a row."""

    def __init__(self, k: int) -> None:
        """Keep the `k` largest."""
        self.k = k

    def select(self, pre: Float[Tensor, "batch d_sae"]) -> SparseCode:
        """Return the k largest of each row; those at or below 0 have the value 0."""
        values, features = top_k_rows(pre, self.k)
        return SparseCode.from_rows(features, values.relu_(), pre.shape[1])

    def observe(self, code: SparseCode) -> None:
        """Do nothing: TopK remembers nothing."""

    def state(self) -> dict[str, Tensor]:
        """Return nothing."""
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Do nothing."""

    def rule(self) -> InferenceRule:
        """Keep the k largest."""
        return InferenceRule("topk", k=self.k)
