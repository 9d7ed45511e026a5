"""Which hook points of a store are meant by names and patterns, in the order in which the model computes them."""

import re

from mi_pipe.activations.store import ActivationStore
from mi_pipe.core.errors import HookPointError, near_names
from mi_pipe.models.hook_points import layer_of

_WITHIN_BLOCK = ("resid_pre", "ln1", "attn", "resid_mid", "ln2", "mlp", "resid_post")


def choose_hooks(patterns: str | list[str] | None, store: ActivationStore) -> list[str]:
    """Return the store's hook points that names and patterns (`*` for a number) mean, by layer, then within the block.

    Raises HookPointError for one that the store does not have.
    """
    chosen: dict[str, None] = {}
    for pattern in [patterns] if isinstance(patterns, str) else patterns or store.hooks:
        shape = re.compile(re.escape(pattern).replace(re.escape("*"), r"\d+"))
        found = [hook for hook in store.hooks if shape.fullmatch(hook)]
        if not found:
            near = near_names(pattern, store.hooks)
            raise HookPointError(f"{store.id} holds no {pattern!r}.{near} It holds {', '.join(store.hooks)}.")
        chosen |= dict.fromkeys(found)
    return sorted(chosen, key=_order)


def _order(hook: str) -> tuple[int, int]:
    """Return layer and place within the block; hook points outside the blocks come first, as embeddings do."""
    layer = layer_of(hook)
    place = next((i for i, part in enumerate(_WITHIN_BLOCK) if part in hook), len(_WITHIN_BLOCK))
    return (-1 if layer is None else layer), place
