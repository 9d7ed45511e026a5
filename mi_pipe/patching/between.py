"""A patch of the residual stream between attention and MLP, which no module of a model puts out, by hooks.

The block is entered with the new value where it is patched, and its attention adds nothing there; elsewhere it adds
what it adds in the base run. So the value between them is the new one to the last bit: were the difference added to
what attention puts out, rounding would be left where the new value is zero, and the next norm would blow it up.
"""

import torch

from mi_pipe.core.errors import StageError
from mi_pipe.models.model import Edit
from mi_pipe.patching.patches import Patches
from mi_pipe.patching.runs import PairRuns

_MID = ".hook_resid_mid"
_ENDS = (".hook_attn_out", ".attn.hook_out")
"""Where attention enters the residual stream, if that is a module's output, and the attention itself."""


def is_between(hook: str) -> bool:
    """Say whether a hook point lies between attention and MLP."""
    return hook.endswith(_MID)


def edits_between(patches: Patches, runs: PairRuns, first_pos: int = 0) -> dict[str, Edit]:
    """Return the edits, by hook point, that make patches between attention and MLP."""
    block = patches.edited_hook.removesuffix(_MID)
    end = next(block + name for name in _ENDS if block + name in runs.base)
    added = runs.base[end][patches.pair, first_pos:]
    left = patches.replaced(added, torch.zeros_like(added), first_pos)
    return {f"{block}.hook_resid_pre": patches.edit(runs, first_pos), end: lambda value: left.view(value.shape)}


def not_between(architecture: str, error: float) -> StageError:
    """Return what to raise where a block's output does not follow from the value between attention and MLP."""
    return StageError(
        f"What leaves {architecture}'s blocks is not made of the residual stream between attention and MLP "
        f"(off by {error:.1e}), so it cannot be patched there. Leave the unit resid_mid out."
    )
