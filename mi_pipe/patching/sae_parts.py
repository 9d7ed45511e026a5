"""Patched parts of what an SAE makes of a hook point's value: single features, and the error.

    x = Σ_f z_f W_dec,f + b_dec + e,   z = encode(x)

A patch of feature f puts (z'_f - z_f) W_dec,f on top of the base run's x, a patch of the error e' - e, with z' and e'
the donor run's, or an ablation's (Marks et al. 2024 take x apart so for their circuits). The base run's error is kept
when features are patched, and its features when the error is. All features and the error together are the donor's x.

A part has a name beside its hook point's: `blocks.3.hook_resid_post.sae_feature` stands for the activations of the
chosen features, (pair, pos, feature), and `….sae_error` for e, (pair, pos, width).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mi_pipe.models.hook_points import layer_of
from mi_pipe.saes.sae import SAE

FEATURE, ERROR = ".sae_feature", ".sae_error"


def is_sae_part(name: str) -> bool:
    """Say whether a name stands for part of what an SAE makes of a value."""
    return name.endswith((FEATURE, ERROR))


def whole_hook(name: str) -> str:
    """Return the hook point of whose value a name stands for a part; other names as they are.

    >>> whole_hook("blocks.3.hook_resid_post.sae_error")
    'blocks.3.hook_resid_post'
    """
    return name.removesuffix(FEATURE).removesuffix(ERROR)


@dataclass(frozen=True)
class SAEParts:
    """The SAEs of a sweep by layer, on the model's device, and which of their features are patched."""

    saes: Mapping[int, SAE]
    features: Mapping[int, Int[Tensor, " feature"]]

    def hook(self, layer: int) -> str:
        """Return where a layer's SAE is."""
        return self.saes[layer].hook

    @torch.no_grad()
    def read(self, names: Iterable[str], values: Mapping[str, Tensor]) -> dict[str, Float[Tensor, "pair pos width"]]:
        """Return the values of these parts, given those of the hook points that they are parts of."""
        found: dict[str, Tensor] = {}
        codes: dict[str, Tensor] = {}
        for name in names:
            hook, layer = whole_hook(name), _layer(name)
            sae = self.saes[layer]
            if hook not in codes:
                codes[hook] = sae.encode(values[hook])
            is_error = name.endswith(ERROR)
            found[name] = values[hook] - sae.decode(codes[hook]) if is_error else codes[hook][..., self.features[layer]]
        return found

    def written(
        self, name: str, change: Float[Tensor, "row pos width"], feature: Int[Tensor, " row"] | None
    ) -> Float[Tensor, "row pos d_in"]:
        """Return what a change of a part adds to the hook point's value.

        Of the features only the one with this number among the chosen is changed in each row, without it all of them.
        """
        if name.endswith(ERROR):
            return change
        directions = self.saes[_layer(name)].W_dec[self.features[_layer(name)]]
        if feature is None:
            return change @ directions
        of_row = change.gather(2, feature[:, None, None].expand(-1, change.shape[1], 1))
        return of_row * directions[feature][:, None]


def plain_hooks(names: Sequence[str]) -> list[str]:
    """Return the hook points behind names that may stand for parts, each once."""
    return list(dict.fromkeys(whole_hook(name) for name in names))


def _layer(name: str) -> int:
    layer = layer_of(name)
    assert layer is not None, "SAEs that are patched lie in blocks"
    return layer
