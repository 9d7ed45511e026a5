"""The trained tensors of one SAE in the normalised space, and what they start from."""

from dataclasses import dataclass, fields, replace

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass
class Parameters:
    """Trained tensors, one row a feature in both matrices; also their gradients, under the same names."""

    W_enc: Float[Tensor, "d_sae d_in"]
    W_dec: Float[Tensor, "d_sae d_out"]
    b_enc: Float[Tensor, " d_sae"]
    b_dec: Float[Tensor, " d_out"]
    threshold: Float[Tensor, " d_sae"] | None = None
    """θ of JumpReLU."""
    r_mag: Float[Tensor, " d_sae"] | None = None
    """Log scale of Gated's magnitudes."""
    b_mag: Float[Tensor, " d_sae"] | None = None
    """Bias of Gated's magnitudes."""
    W_skip: Float[Tensor, "d_out d_in"] | None = None
    """A transcoder's linear path around the features."""
    subtract_b_dec: bool = True
    """Whether the encoder reads x - b_dec (it does where input and output are the same) or x."""

    @property
    def device(self) -> torch.device:
        """Device of the tensors."""
        return self.W_enc.device

    @property
    def d_sae(self) -> int:
        """Number of features."""
        return self.W_enc.shape[0]

    def to(self, device: torch.device) -> "Parameters":
        """Return the tensors on another device (the same ones if they are there)."""
        return replace(self, **{name: value.to(device) for name, value in self.named().items()})

    def copy(self) -> "Parameters":
        """Return a copy that shares no memory."""
        return replace(self, **{name: value.clone() for name, value in self.named().items()})

    def named(self) -> dict[str, Tensor]:
        """Return the tensors by name, in an order that does not change."""
        values = ((item.name, getattr(self, item.name)) for item in fields(self))
        return {name: value for name, value in values if isinstance(value, Tensor)}

    def centred(self, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_in"]:
        """Return what the encoder's product reads."""
        return x - self.b_dec if self.subtract_b_dec else x

    def add_(self, other: "Parameters") -> None:
        """Add another's tensors, those that it has."""
        mine = self.named()
        for name, value in other.named().items():
            mine[name].add_(value)


def initial_parameters(d_in: int, d_sae: int, seed: int, d_out: int | None = None, skip: bool = False) -> Parameters:
    """Return random unit decoder rows, the encoder tied to them, and zero biases.

    With `d_out` (a transcoder) the encoder has random unit rows of its own and `skip` adds W_skip = 0.
    """
    generator = torch.Generator().manual_seed(seed)
    W_dec = torch.randn(d_sae, d_out or d_in, generator=generator)  # noqa: N806 (the field's name)
    unit_rows_(W_dec)
    W_enc = W_dec.clone()  # noqa: N806
    if d_out is not None:
        W_enc = torch.randn(d_sae, d_in, generator=generator)  # noqa: N806
        unit_rows_(W_enc)
    return Parameters(
        W_enc,
        W_dec,
        b_enc=torch.zeros(d_sae),
        b_dec=torch.zeros(W_dec.shape[1]),
        W_skip=torch.zeros(W_dec.shape[1], d_in) if skip else None,
        subtract_b_dec=d_out is None,
    )


def unit_rows_(matrix: Tensor) -> None:
    """Scale the rows of a matrix to norm 1, in place."""
    matrix.div_(torch.linalg.vector_norm(matrix, dim=1, keepdim=True).clamp_min_(torch.finfo(matrix.dtype).tiny))
