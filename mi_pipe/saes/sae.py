"""A trained sparse autoencoder, transcoder or crosscoder on raw activations: encode, decode, forward.

z = σ(W_encᵀ (x - b_dec) + b_enc), x̂ = W_decᵀ z + b_dec, σ the stored inference rule (`mi_pipe.saes.inference`).

A transcoder reads one hook point and reconstructs another: z = σ(W_encᵀ x + b_enc), ŷ = W_decᵀ z + W_skip x + b_dec,
W_skip only where it was asked for (Dunefsky et al. 2024; Paulo et al. 2025 for the skip). A crosscoder reads and
reconstructs several hook points at once: x is their activations side by side (Lindsey et al. 2024).
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mi_pipe.saes.cfg import SAECfg, cfg_of
from mi_pipe.saes.code import SparseCode
from mi_pipe.saes.inference import InferenceRule
from mi_pipe.saes.sites import Sites


class SAE(nn.Module):
    """One sparse autoencoder; tensors in float32, without gradients unless asked for."""

    def __init__(
        self,
        W_enc: Float[Tensor, "d_in d_sae"],  # noqa: N803 (the field's names)
        b_enc: Float[Tensor, " d_sae"],
        W_dec: Float[Tensor, "d_sae d_out"],  # noqa: N803
        b_dec: Float[Tensor, " d_out"],
        rule: InferenceRule,
        hook: str = "",
        architecture: str = "topk",
        name: str = "",
        *,
        W_skip: Float[Tensor, "d_out d_in"] | None = None,  # noqa: N803
        subtract_b_dec: bool = True,
        sites: Sites | None = None,
        model: str = "",
    ) -> None:
        """Hold the weights and the inference rule; `hook` (or `sites`), `architecture`, `model` say where they are
        from.

        Raises ValueError for shapes that do not fit together.
        """
        super().__init__()
        _check_shapes(W_enc, b_enc, W_dec, b_dec, W_skip, subtract_b_dec)
        self.W_enc = nn.Parameter(W_enc, requires_grad=False)
        self.b_enc = nn.Parameter(b_enc, requires_grad=False)
        self.W_dec = nn.Parameter(W_dec, requires_grad=False)
        self.b_dec = nn.Parameter(b_dec, requires_grad=False)
        self.W_skip = None if W_skip is None else nn.Parameter(W_skip, requires_grad=False)
        self._rule = rule
        for key in ("threshold", "r_mag", "b_mag"):
            self.register_buffer(key, rule.tensors().get(key))
        self.threshold: Tensor | None
        self.subtract_b_dec = subtract_b_dec
        self.sites = sites or Sites.of_sae(hook, W_dec.shape[1])
        self.architecture = architecture
        self.name = name
        self.model = model
        self._cfg: SAECfg | None = None

    @property
    def rule(self) -> InferenceRule:
        """How features are selected, with the tensors as they are now (moved, cast)."""
        buffers = {name: getattr(self, name) for name in self._rule.tensors()}
        return self._rule.with_tensors(buffers)

    @property
    def k(self) -> int | None:
        """Features a row for TopK; the target of training for others, None where there was none."""
        return self._rule.k

    @property
    def hook(self) -> str:
        """The hook point that is read; of a crosscoder, the first."""
        return self.sites.inputs[0]

    @property
    def hook_out(self) -> str:
        """The hook point that is reconstructed; of a crosscoder, the first."""
        return self.sites.outputs[0]

    @property
    def d_in(self) -> int:
        """Width of what is read: of all hook points together."""
        return self.W_enc.shape[0]

    @property
    def d_out(self) -> int:
        """Width of what is reconstructed."""
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

    @property
    def cfg(self) -> SAECfg:
        """What programs written for SAELens ask of an SAE: one object, which they may add to."""
        now = cfg_of(self)
        if self._cfg is None:
            self._cfg = now
        self._cfg.dtype, self._cfg.device = now.dtype, now.device
        return self._cfg

    def pre_activations(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """Return (x - b_dec) W_enc + b_enc (a transcoder: x W_enc + b_enc), before selection."""
        x = x.to(self.dtype)
        return (x - self.b_dec if self.subtract_b_dec else x) @ self.W_enc + self.b_enc

    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """Return feature activations of raw activations."""
        return self.rule.dense(self.pre_activations(x), self.b_enc)

    def encode_sparse(self, x: Float[Tensor, "batch d_in"]) -> SparseCode:
        """Return the same activations as `encode`, as a sparse code by row: faster where few features fire."""
        return self.rule.sparse(self.pre_activations(x), self.b_enc)

    def decode(self, z: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_out"]:
        """Return the reconstruction from feature activations, without what a skip connection adds."""
        return z @ self.W_dec + self.b_dec

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """Return the reconstruction of raw activations."""
        return self.with_skip(self.decode(self.encode(x)), x)

    def with_skip(
        self, decoded: Float[Tensor, "*batch d_out"], x: Float[Tensor, "*batch d_in"]
    ) -> Float[Tensor, "*batch d_out"]:
        """Return what was decoded with what a skip connection adds, if there is one."""
        return decoded if self.W_skip is None else decoded + x.to(self.dtype) @ self.W_skip.T

    def by_output(self, reconstruction: Float[Tensor, "*batch d_out"]) -> dict[str, Float[Tensor, "*batch width"]]:
        """Return the part of a reconstruction that belongs to each hook point."""
        parts = reconstruction.split(self.sites.output_widths, dim=-1)
        return dict(zip(self.sites.outputs, parts, strict=True))

    def decoder_norms(self) -> Float[Tensor, "d_sae output"]:
        """Return the norm of each feature's decoder row at each hook point: what a crosscoder's features share."""
        parts = self.W_dec.split(self.sites.output_widths, dim=1)
        return torch.stack([torch.linalg.vector_norm(part, dim=1) for part in parts], dim=1)

    def extra_repr(self) -> str:
        """Say where it comes from and how large it is."""
        place = self.name or " + ".join(self.sites.inputs)
        return f"{place}: {self.architecture} {self.sites.kind}, d_in={self.d_in}, d_sae={self.d_sae}, k={self.k}"


def _check_shapes(
    W_enc: Tensor,  # noqa: N803
    b_enc: Tensor,
    W_dec: Tensor,  # noqa: N803
    b_dec: Tensor,
    W_skip: Tensor | None,  # noqa: N803
    subtract_b_dec: bool,
) -> None:
    d_in, d_sae = W_enc.shape
    d_out = b_dec.shape[0]
    fits = b_enc.shape == (d_sae,) and W_dec.shape == (d_sae, d_out) and (d_in == d_out or not subtract_b_dec)
    if not fits or (W_skip is not None and W_skip.shape != (d_out, d_in)):
        shapes = {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec, "W_skip": W_skip}
        told = ", ".join(f"{name} {tuple(value.shape)}" for name, value in shapes.items() if value is not None)
        raise ValueError(f"the tensors of an SAE do not fit together: {told}")
