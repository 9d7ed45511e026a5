"""What is maximised: one number a row of one hook point: of a neuron, a direction, a head or a feature.

`values` is what is reported, `climbed` what gradient ascent follows. They differ for features of SAEs alone: a feature
that is not selected is 0 with a derivative of 0, so ascent follows its pre-activation.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from mi_pipe.core.errors import ConfigError
from mi_pipe.models.head_weights import head_weights
from mi_pipe.models.model import Model
from mi_pipe.saes.sae import SAE
from mi_pipe.saes.step import chunks_of


class Target(Protocol):
    """One number a row."""

    @property
    def name(self) -> str:
        """What it is called in tables."""
        ...

    @property
    def hook(self) -> str:
        """Where it is read."""
        ...

    def check(self, width: int) -> None:
        """Raise ConfigError unless rows of `width` values have it."""
        ...

    def values(self, x: Float[Tensor, "row width"]) -> Float[Tensor, " row"]:
        """Return its activation at raw float32 rows."""
        ...

    def climbed(self, x: Float[Tensor, "row width"]) -> Float[Tensor, " row"]:
        """Return what gradient ascent follows."""
        ...


@dataclass(frozen=True)
class Neuron:
    """One value of a hook point, such as a neuron at `blocks.9.mlp.hook_post`."""

    hook: str
    index: int

    @property
    def name(self) -> str:
        """Hook point and number."""
        return f"{self.hook}[{self.index}]"

    def check(self, width: int) -> None:
        """Raise ConfigError for a number beyond the last."""
        if not 0 <= self.index < width:
            raise ConfigError(f"{self.hook!r} has values 0 to {width - 1}; there is no {self.index}.")

    def values(self, x: Float[Tensor, "row width"]) -> Float[Tensor, " row"]:
        """Return the column."""
        return x[:, self.index]

    climbed = values


@dataclass(frozen=True, eq=False)
class Projection:
    """The product of a hook point's values with a direction: a probe's, a steering vector's, an unembedding row's."""

    hook: str
    direction: Float[Tensor, " width"]
    name: str = "projection"

    def check(self, width: int) -> None:
        """Raise ConfigError for a direction of another width."""
        if self.direction.shape != (width,):
            raise ConfigError(
                f"{self.hook!r} has {width} values, and the direction {self.name!r} {len(self.direction)}."
            )

    def values(self, x: Float[Tensor, "row width"]) -> Float[Tensor, " row"]:
        """Return x · direction."""
        return x @ self.direction.to(x)

    climbed = values


@dataclass(frozen=True, eq=False)
class HeadOutput:
    """What one head writes to the residual stream, z W_O: its norm, or its product with a direction there."""

    hook: str
    """`blocks.<layer>.attn.hook_z`."""
    head: int
    W_O: Float[Tensor, "d_head d_model"]
    direction: Float[Tensor, " d_model"] | None = None

    @property
    def name(self) -> str:
        """Hook point and head."""
        return f"{self.hook}[head {self.head}]"

    def check(self, width: int) -> None:
        """Raise ConfigError if there is no such head, or the direction is no vector of the residual stream."""
        d_head, d_model = self.W_O.shape
        if not 0 <= self.head < width // d_head:
            raise ConfigError(f"{self.hook!r} has heads 0 to {width // d_head - 1}; there is no {self.head}.")
        if self.direction is not None and self.direction.shape != (d_model,):
            raise ConfigError(f"Heads write vectors of width {d_model}, and the direction has {len(self.direction)}.")

    def values(self, x: Float[Tensor, "row width"]) -> Float[Tensor, " row"]:
        """Return ‖z W_O‖, or z W_O · direction."""
        d_head = len(self.W_O)
        written = x[:, self.head * d_head : (self.head + 1) * d_head] @ self.W_O.to(x)
        return written.norm(dim=1) if self.direction is None else written @ self.direction.to(x)

    climbed = values


def head_output(model: Model, layer: int, head: int, direction: Float[Tensor, " d_model"] | None = None) -> HeadOutput:
    """Return a head of a model as a target; raises ConfigError or HookPointError if there is none."""
    hook = f"blocks.{layer}.attn.hook_z"
    width = model.hooks[hook].width
    W_O = head_weights(model, layer).W_O  # noqa: N806 (the field's name)
    if not 0 <= head < len(W_O):
        raise ConfigError(f"{hook!r} has heads 0 to {len(W_O) - 1}; there is no {head}.")
    target = HeadOutput(hook, head, W_O[head].float(), direction)
    target.check(width)
    return target


@dataclass(frozen=True, eq=False)
class Feature:
    """One feature of an SAE or a transcoder, by its inference rule."""

    sae: SAE
    index: int

    @property
    def name(self) -> str:
        """SAE and number."""
        return f"{self.sae.name or self.hook}[feature {self.index}]"

    @property
    def hook(self) -> str:
        """The hook point that the SAE reads."""
        return self.sae.hook

    def check(self, width: int) -> None:
        """Raise ConfigError for a feature beyond the last, a crosscoder, or an SAE of another width."""
        if len(self.sae.sites.inputs) > 1:
            raise ConfigError(f"{self.sae.name} is a crosscoder: its features are not read at one hook point.")
        if not 0 <= self.index < self.sae.d_sae:
            raise ConfigError(f"{self.sae.name} has features 0 to {self.sae.d_sae - 1}; there is no {self.index}.")
        if self.sae.d_in != width:
            raise ConfigError(f"{self.sae.name} reads vectors of width {self.sae.d_in}; {self.hook} has {width}.")

    def values(self, x: Float[Tensor, "row width"]) -> Float[Tensor, " row"]:
        """Return the activation after selection among all features."""
        parts = [self.sae.encode(x[rows].to(self.sae.device)) for rows in chunks_of(len(x), self.sae.d_sae)]
        return torch.cat([part[:, self.index] for part in parts])

    def climbed(self, x: Float[Tensor, "row width"]) -> Float[Tensor, " row"]:
        """Return the pre-activation."""
        sae = self.sae
        shifted = x.to(sae.device) - sae.b_dec if sae.subtract_b_dec else x.to(sae.device)
        return shifted @ sae.W_enc[:, self.index] + sae.b_enc[self.index]
