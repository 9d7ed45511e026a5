"""A trained sparse autoencoder on raw activations: encode, decode, forward.

z = σ((x - b_dec) W_enc + b_enc), x̂ = z W_dec + b_dec. σ is the stored inference rule: `topk` keeps the k largest above
0, `threshold` keeps z_j = pre_j [pre_j > θ] (θ one number or one a feature, never below 0).
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mi_pipe.saes.architecture import InferenceRule
from mi_pipe.saes.code import SparseCode
from mi_pipe.saes.kernels import top_k_rows


class SAE(nn.Module):
    """One sparse autoencoder; tensors in float32, without gradients unless asked for."""

    def __init__(
        self,
        W_enc: Float[Tensor, "d_in d_sae"],  # noqa: N803 (the field's names)
        b_enc: Float[Tensor, " d_sae"],
        W_dec: Float[Tensor, "d_sae d_in"],  # noqa: N803
        b_dec: Float[Tensor, " d_in"],
        rule: InferenceRule,
        hook: str = "",
        architecture: str = "topk",
        name: str = "",
    ) -> None:
        """Hold the weights and the inference rule; `hook` and `architecture` say where they come from."""
        super().__init__()
        self.W_enc = nn.Parameter(W_enc, requires_grad=False)
        self.b_enc = nn.Parameter(b_enc, requires_grad=False)
        self.W_dec = nn.Parameter(W_dec, requires_grad=False)
        self.b_dec = nn.Parameter(b_dec, requires_grad=False)
        self.rule = rule.kind
        self.k = rule.k
        self.threshold: Tensor | None
        self.register_buffer("threshold", rule.threshold)
        self.hook = hook
        self.architecture = architecture
        self.name = name

    @property
    def d_in(self) -> int:
        """Width of the activations."""
        return self.W_dec.shape[1]

    @property
    def d_sae(self) -> int:
        """Number of features."""
        return self.W_dec.shape[0]

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.W_dec.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return self.W_dec.dtype

    def pre_activations(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """Return (x - b_dec) W_enc + b_enc, before selection."""
        return (x.to(self.dtype) - self.b_dec) @ self.W_enc + self.b_enc

    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """Return feature activations of raw activations."""
        pre = self.pre_activations(x)
        if self.rule == "topk":
            assert self.k is not None, "a topk rule has k"
            values, features = pre.topk(self.k, dim=-1, sorted=False)
            return torch.zeros_like(pre).scatter_(-1, features, values.relu())
        assert self.threshold is not None, "a threshold rule has a threshold"
        return torch.where(pre > self.threshold, pre, 0.0).relu()

    def encode_sparse(self, x: Float[Tensor, "batch d_in"]) -> SparseCode:
        """Return the same activations as `encode`, as a sparse code by row: faster where few features fire."""
        pre = torch.addmm(self.b_enc, x.to(self.dtype) - self.b_dec, self.W_enc)
        if self.rule == "topk":
            assert self.k is not None, "a topk rule has k"
            values, features = top_k_rows(pre, self.k)
            return SparseCode.from_rows(features, values.relu_(), self.d_sae)
        assert self.threshold is not None, "a threshold rule has a threshold"
        row, feature = (pre > self.threshold.clamp_min(0)).nonzero(as_tuple=True)
        starts = torch.zeros(len(pre) + 1, dtype=torch.int32, device=pre.device)
        starts[1:] = torch.bincount(row, minlength=len(pre)).cumsum(0)
        return SparseCode(starts, feature.to(torch.int32), pre[row, feature], self.d_sae)

    def decode(self, z: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_in"]:
        """Return the reconstruction from feature activations."""
        return z @ self.W_dec + self.b_dec

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_in"]:
        """Return the reconstruction of raw activations."""
        return self.decode(self.encode(x))

    def extra_repr(self) -> str:
        """Say where it comes from and how large it is."""
        return f"{self.name or self.hook}: {self.architecture}, d_in={self.d_in}, d_sae={self.d_sae}, k={self.k}"
