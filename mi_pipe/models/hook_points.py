"""Hook points: TransformerLens' names, their shapes, and where each lies in the model's own modules.

A map is made from a model without weights (on torch's meta device): the TransformerLens bridge is built
around it and run once, which gives every hook name and shape; each hook that is just the input or output of
one of the model's own modules is noted with that module's path. Such hooks are read and patched on the
plain model, without the bridge; the others (attention patterns, split q, k, v of fused projections) need it.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from mi_pipe.core.errors import HookPointError, near_names

_LAYER = re.compile(r"^blocks\.(\d+)\.")
_PROBE_BATCH = 2
_PROBE_POSITIONS = 3
_SEQUENCE_DIMS = 2


@dataclass(frozen=True)
class HookSite:
    """One hook point of one model."""

    name: str
    shape: tuple[int, ...]
    """Shape of one token's value, such as (d_model,) or (n_heads, d_head); () if it has no pos axis."""
    module_path: str | None
    """Path of the model's own module, or None if only the bridge can reach it."""
    side: Literal["in", "out"]

    @property
    def layer(self) -> int | None:
        """The block's index, or None outside the blocks."""
        return layer_of(self.name)

    @property
    def width(self) -> int:
        """Number of values a token."""
        return int(torch.Size(self.shape).numel())


class HookMap:
    """All hook points of a model."""

    def __init__(self, sites: Iterable[HookSite]) -> None:
        """Hold the sites by name."""
        self._sites = {site.name: site for site in sites}

    def __iter__(self):
        """Iterate over the sites."""
        return iter(self._sites.values())

    def __contains__(self, name: str) -> bool:
        """Say whether the model has the hook point."""
        return name in self._sites

    def __getitem__(self, name: str) -> HookSite:
        """Return a site; raises HookPointError with near names, or with the range of layers."""
        if name in self._sites:
            return self._sites[name]
        layer = layer_of(name)
        n_layers = 1 + max((site.layer for site in self if site.layer is not None), default=-1)
        if layer is not None and layer >= n_layers:
            raise HookPointError(f"Hook point {name!r}: the model has layers 0 to {n_layers - 1}, not {layer}.")
        near = near_names(name, self._sites)
        kinds = "resid_pre, resid_post, attn_out, mlp_out" if not near else ""
        hint = f" Hook points of a block are, among others, {kinds}: blocks.0.hook_resid_pre." if kinds else near
        raise HookPointError(f"The model has no hook point {name!r}.{hint}")


def layer_of(hook_name: str) -> int | None:
    """Return the block index in a hook name, or None.

    >>> layer_of("blocks.12.hook_resid_post")
    12
    """
    found = _LAYER.match(hook_name)
    return int(found.group(1)) if found else None


def map_hooks(bridge: Any, module_paths: dict[int, str]) -> HookMap:
    """Run a bridge once (weights and data are not looked at) and list its hook points.

    `module_paths` maps `id(module)` of the model's own modules, taken before the bridge wrapped them, to
    their paths.
    """
    tokens = torch.zeros(_PROBE_BATCH, _PROBE_POSITIONS, dtype=torch.long, device=bridge.cfg.device)
    with torch.no_grad():
        _, cache = bridge.run_with_cache(tokens)
    hooks = bridge.hook_dict
    return HookMap(_site(bridge, name, tuple(value.shape), hooks, module_paths) for name, value in cache.items())


def _site(bridge: Any, name: str, shape: tuple[int, ...], hooks: dict[str, Any], paths: dict[int, str]) -> HookSite:
    canonical = hooks[name].name if name in hooks else name
    component_path, _, hook = canonical.rpartition(".")
    path = None
    # The bridge repeats learned position embeddings over the batch; the module's own value has no batch axis.
    if hook in ("hook_in", "hook_out") and component_path != "pos_embed":
        component = _resolve(bridge, component_path)
        path = paths.get(id(getattr(component, "original_component", None)))
    has_positions = len(shape) > _SEQUENCE_DIMS and shape[:_SEQUENCE_DIMS] == (_PROBE_BATCH, _PROBE_POSITIONS)
    token_shape = shape[_SEQUENCE_DIMS:] if has_positions else ()
    return HookSite(name, token_shape, path, "in" if hook == "hook_in" else "out")


def _resolve(root: Any, path: str) -> Any:
    for part in path.split("."):
        root = root[int(part)] if part.isdigit() else getattr(root, part, None)
        if root is None:
            return None
    return root


def module_paths(module: nn.Module) -> dict[int, str]:
    """Return the path of every sub-module by `id`."""
    return {id(child): path for path, child in module.named_modules()}
