"""One run of the plain model that keeps values at hook points and the last position's logits."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mi_pipe.core.errors import HookPointError
from mi_pipe.models.model import Model
from mi_pipe.models.reading import Reading, listening
from mi_pipe.patching.readout import last_logits
from mi_pipe.patching.sae_parts import SAEParts, is_sae_part, plain_hooks

_FLAT_DIMS = 2


@torch.no_grad()
def record(
    model: Model, tokens: Int[Tensor, "pair pos"], hooks: list[str], saes: SAEParts | None = None, **options: Any
) -> tuple[Float[Tensor, "pair d_vocab"], dict[str, Tensor]]:
    """Run prompts; return the last position's logits and each hook point's value (pair, pos, width), heads not split.

    Names of parts of SAEs among `hooks` need `saes`. `options` go to the model's forward. Raises HookPointError for
    hook points that only the bridge has, and for those that the model gives no value of when it runs.
    """
    found: dict[str, Tensor] = {}

    def keep(name: str, value: Tensor) -> None:
        # OPT's MLPs know no batch: their values are (pair * pos, width).
        found[name] = (
            value.clone().view(len(tokens), -1, value.shape[-1]) if value.ndim == _FLAT_DIMS else value.clone()
        )

    with listening(model.module, {name: _reading(model, name) for name in plain_hooks(hooks)}, keep):
        logits = last_logits(model, tokens, **options)
    if missing := [name for name in plain_hooks(hooks) if name not in found]:
        raise HookPointError(f"The model gave no value of {missing[0]} when it ran. Leave out what is read there.")
    if parts := [name for name in hooks if is_sae_part(name)]:
        assert saes is not None, "parts are of SAEs"
        found |= saes.read(parts, found)
    return logits, {name: found[name] for name in hooks}


def _reading(model: Model, name: str) -> Reading:
    reading = model.hooks[name].reading
    if reading is None:
        raise HookPointError(f"Hook point {name!r} cannot be read on the plain model; use the bridge.")
    return reading
