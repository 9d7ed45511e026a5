"""Adds vectors to activations while a plain model runs: each row of a batch its own, from a position on."""

from collections.abc import Generator
from contextlib import contextmanager

from jaxtyping import Float
from torch import Tensor

from mi_pipe.models.hook_points import moved_hook
from mi_pipe.models.model import Model
from mi_pipe.patching.edits import edited


@contextmanager
def added(model: Model, hook: str, vectors: Float[Tensor, "row d"], first_pos: int = 0) -> Generator[None]:
    """Within the block, the value of row r at `hook` is x + vectors[r] from position `first_pos` of the call on.

    Positions are those of the tokens that the model is called with, without those in a cache. What is added to
    resid_mid goes to the whole residual stream, by way of attn_out. Raises HookPointError for hook points that cannot
    be edited on the plain model.
    """

    def add(value: Tensor) -> Tensor:
        flat = value.reshape(*value.shape[:2], -1)
        steps = vectors.to(flat)[:, None].expand_as(flat)
        if first_pos:
            steps = steps.clone()
            steps[:, :first_pos] = 0
        return (flat + steps).reshape(value.shape)

    with edited(model, moved_hook(hook), add):
        yield
