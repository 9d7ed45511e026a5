"""The modules of a block that an engine may leave out: normalisation, attention, its output projection, MLP.

Found by the hook points' names, so that no architecture is named here. Whether a block's output really is a function
of what these modules return is checked by the engine on the prompts at hand.
"""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, nn

from mi_pipe.models.model import Model


@dataclass(frozen=True)
class BlockParts:
    """Modules of one block; None where the model has none of its own."""

    norm: nn.Module | None
    """The normalisation before attention."""
    attention: nn.Module | None
    projection: nn.Module | None
    """From the heads' z to the attention's output."""
    mlp: nn.Module | None
    down_projection: nn.Module | None
    """From the neurons to the MLP's output."""
    attention_end: nn.Module | None
    """Whose output enters the residual stream: the attention itself, or a normalisation after it."""
    mlp_end: nn.Module | None


def block_parts(model: Model, layer: int) -> BlockParts:
    """Find the parts of one block."""

    def module(name: str) -> nn.Module | None:
        hook = f"blocks.{layer}.{name}"
        path = model.hooks[hook].module_path if hook in model.hooks else None
        return None if path is None else model.submodule(path)

    return BlockParts(
        norm=module("ln1.hook_out"),
        attention=module("attn.hook_out"),
        projection=module("attn.hook_z"),
        mlp=module("mlp.hook_out"),
        down_projection=module("mlp.hook_post"),
        attention_end=module("hook_attn_out"),
        mlp_end=module("hook_mlp_out"),
    )


def inputs_first(module: nn.Module) -> Float[Tensor, "d_in d_out"]:
    """Return the weight of a linear map by input (GPT-2's Conv1D keeps it so, Linear the other way)."""
    weight = module.weight
    assert isinstance(weight, Tensor), "a projection has a weight matrix"
    return weight if type(module).__name__ == "Conv1D" else weight.T
