"""Inference rules: which features a trained SAE lets through, after training.

pre = W_encᵀ x + b_enc in every case; z is

- topk: the k largest of ReLU(pre) (TopK),
- threshold: pre where pre > θ, else 0, θ one number (BatchTopK, Matryoshka; 0 for ReLU: standard, p-annealing) or one a
  feature (JumpReLU), never below 0,
- gated: ReLU(exp(r) (pre - b_enc) + b_mag) where pre > 0 (Gated; b_enc is the gate's bias).
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from mi_pipe.saes.code import SparseCode
from mi_pipe.saes.selection import top_k_rows

RuleKind = Literal["topk", "threshold", "gated"]


@dataclass(frozen=True)
class InferenceRule:
    """How a trained SAE selects features. Tensors are in the units of its pre-activations."""

    kind: RuleKind
    k: int | None = None
    """Features a row (topk); for other rules the target of training, if there was one."""
    threshold: Float[Tensor, "*d_sae"] | None = None
    """θ, one number or one a feature."""
    r_mag: Float[Tensor, " d_sae"] | None = None
    """Log of what a gated SAE's magnitudes multiply the shared encoder's rows by."""
    b_mag: Float[Tensor, " d_sae"] | None = None
    """Bias of a gated SAE's magnitudes."""

    def __post_init__(self) -> None:
        """Check that the rule has what it needs."""
        needed = {"topk": (self.k,), "threshold": (self.threshold,), "gated": (self.r_mag, self.b_mag)}[self.kind]
        if any(value is None for value in needed):
            raise ValueError(f"a {self.kind} rule lacks a tensor or k")

    def tensors(self) -> dict[str, Tensor]:
        """Return the rule's tensors by name."""
        named = {"threshold": self.threshold, "r_mag": self.r_mag, "b_mag": self.b_mag}
        return {name: value for name, value in named.items() if value is not None}

    def with_tensors(self, tensors: dict[str, Tensor]) -> "InferenceRule":
        """Return the same rule with other tensors."""
        return replace(self, **tensors)

    def scaled(self, factor: float) -> "InferenceRule":
        """Return the rule for pre-activations that are `factor` times as large."""
        return self.with_tensors({name: t * factor for name, t in self.tensors().items() if name != "r_mag"})

    def dense(
        self, pre: Float[Tensor, "*batch d_sae"], b_enc: Float[Tensor, " d_sae"]
    ) -> Float[Tensor, "*batch d_sae"]:
        """Return feature activations of pre-activations."""
        if self.kind == "topk":
            assert self.k is not None, "checked when made"
            values, features = pre.topk(min(self.k, pre.shape[-1]), dim=-1, sorted=False)
            return torch.zeros_like(pre).scatter_(-1, features, values.relu())
        if self.kind == "threshold":
            assert self.threshold is not None, "checked when made"
            return torch.where(pre > self.threshold, pre, 0.0).relu()
        assert self.r_mag is not None, "checked when made"
        assert self.b_mag is not None, "checked when made"
        return torch.where(pre > 0, (self.r_mag.exp() * (pre - b_enc) + self.b_mag).relu(), 0.0)

    def sparse(self, pre: Float[Tensor, "batch d_sae"], b_enc: Float[Tensor, " d_sae"]) -> SparseCode:
        """Return the same as `dense` as a sparse code by row, of the entries that may be above 0."""
        if self.kind == "topk":
            assert self.k is not None, "checked when made"
            values, features = top_k_rows(pre, min(self.k, pre.shape[1]))
            return SparseCode.from_rows(features, values.relu_(), pre.shape[1])
        bound = 0.0 if self.threshold is None else self.threshold.clamp_min(0)
        code = SparseCode.above(pre, bound)
        if self.kind == "threshold":
            return code
        assert self.r_mag is not None, "checked when made"
        assert self.b_mag is not None, "checked when made"
        features = code.features
        values = self.r_mag[features].exp() * (code.values - b_enc[features]) + self.b_mag[features]
        return code.with_values(values.relu_())
