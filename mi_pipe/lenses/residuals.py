"""The residual stream of live runs at every depth, with the model's own logits."""

from collections.abc import Iterable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mi_pipe.core.errors import HookPointError
from mi_pipe.lenses.depths import hook_at
from mi_pipe.models.hook_points import HookMap
from mi_pipe.models.model import Model
from mi_pipe.models.reading import Reading, listening

Residuals = dict[int, Float[Tensor, "batch pos d_model"]]


def reading_at(hooks: HookMap, depth: int) -> Reading:
    """Return how the residual stream at a depth is read; raises HookPointError if the plain model does not have it."""
    reading = hooks[hook_at(depth)].reading
    if reading is None:
        raise HookPointError(f"{hook_at(depth)} is not a value of the model's own modules, so no lens can look at it.")
    return reading


@torch.no_grad()
def run_residuals(
    model: Model, tokens: Int[Tensor, "batch pos"], depths: Iterable[int]
) -> tuple[Residuals, Float[Tensor, "batch pos d_vocab"]]:
    """Run the plain model on prompts of one length; returns copies of the residual stream by depth, and the logits."""
    found: Residuals = {}

    def keep(name: str, value: Tensor) -> None:
        found[int(name)] = value.clone()

    readings = {str(depth): reading_at(model.hooks, depth) for depth in depths}
    with listening(model.module, readings, keep):
        logits = model.logits(tokens.to(model.device))
    return found, logits
