"""Depths: where in the residual stream a lens looks, counted in blocks that have written to it.

Depth 0 is the embedding (`blocks.0.hook_resid_pre`), depth l the stream after l blocks: `blocks.{l-1}.hook_resid_post`,
which is `blocks.{l}.hook_resid_pre`, the same value under two names.
"""

import re
from collections.abc import Sequence

from mi_pipe.core.errors import HookPointError

_RESIDUAL = re.compile(r"blocks\.(\d+)\.hook_resid_(pre|post)")


def depth_of(hook: str) -> int | None:
    """Return the depth of a hook point of the residual stream, or None of others.

    >>> depth_of("blocks.3.hook_resid_pre"), depth_of("blocks.3.hook_resid_post"), depth_of("blocks.3.hook_mlp_out")
    (3, 4, None)
    """
    found = _RESIDUAL.fullmatch(hook)
    if found is None:
        return None
    return int(found.group(1)) + (found.group(2) == "post")


def hook_at(depth: int) -> str:
    """Return the hook point at a depth.

    >>> hook_at(0), hook_at(2)
    ('blocks.0.hook_resid_pre', 'blocks.1.hook_resid_post')
    """
    return f"blocks.{depth - 1}.hook_resid_post" if depth else "blocks.0.hook_resid_pre"


def residual_hooks(hooks: Sequence[str], n_layers: int) -> dict[int, str]:
    """Return the hook points that are of the residual stream, by depth, ascending, the last depth too if it is there.

    Raises HookPointError if none is before the last depth, so that there is nothing to look through a lens at.
    """
    found = {depth: hook for hook in hooks if (depth := depth_of(hook)) is not None}
    if not any(depth < n_layers for depth in found):
        raise HookPointError(
            f"Of {', '.join(hooks) or 'no hook points'} none is of the residual stream before the last layer, so that "
            "no tuned lens can be trained. Harvest blocks.*.hook_resid_post."
        )
    return dict(sorted(found.items()))
