"""Hook points: TransformerLens' names and module paths, their shapes, and where each lies in the model's own modules.

How they are listed is in mi_pipe/models/bridge_sites.py and module_sites.py.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from mi_pipe.core.errors import HookPointError, near_names
from mi_pipe.models.reading import Reading

_LAYER = re.compile(r"^blocks\.(\d+)\.")


@dataclass(frozen=True)
class HookSite:
    """One hook point of one model."""

    name: str
    shape: tuple[int, ...]
    """Shape of one token's value, such as (d_model,) or (n_heads, d_head); () if it has no pos axis."""
    module_path: str | None
    """Path of the model's own module whose input or output this is, or None."""
    side: Literal["in", "out"]
    derived: Reading | None = None
    """How it follows from one of the model's own modules, if it does so by a rule."""
    pattern_heads: int | None = None
    """Number of heads if this is an attention pattern, whose shape a token is (head, key) and depends on the prompt."""

    @property
    def layer(self) -> int | None:
        """The block's index, or None outside the blocks."""
        return layer_of(self.name)

    @property
    def width(self) -> int:
        """Number of values a token."""
        return int(torch.Size(self.shape).numel())

    @property
    def reading(self) -> Reading | None:
        """How the value is read on the plain model, or None if only the bridge has it."""
        return Reading(self.module_path, self.side) if self.module_path is not None else self.derived


class HookMap:
    """All hook points of a model."""

    def __init__(self, sites: Iterable[HookSite], modules: Iterable[HookSite] = ()) -> None:
        """Hold the sites of TransformerLens' names, and those that are named by a module's path."""
        self._sites = {site.name: site for site in sites}
        self._modules = {site.name: site for site in modules}

    def __iter__(self) -> Iterator[HookSite]:
        """Iterate over the sites with TransformerLens' names."""
        return iter(self._sites.values())

    @property
    def modules(self) -> list[HookSite]:
        """The sites that are named by a module's path."""
        return list(self._modules.values())

    def is_module(self, name: str) -> bool:
        """Say whether a name is a module's path and none of TransformerLens'."""
        return name in self._modules and name not in self._sites

    def __contains__(self, name: str) -> bool:
        """Say whether the model has the hook point."""
        return name in self._sites or name in self._modules

    def __getitem__(self, name: str) -> HookSite:
        """Return a site; raises HookPointError with near names, or with the range of layers."""
        for sites in (self._sites, self._modules):
            if name in sites:
                return sites[name]
        layer = layer_of(name)
        n_layers = 1 + max((site.layer for site in self if site.layer is not None), default=-1)
        if layer is not None and n_layers and layer >= n_layers:
            raise HookPointError(f"Hook point {name!r}: the model has layers 0 to {n_layers - 1}, not {layer}.")
        near = near_names(name, [*self._sites, *self._modules])
        kinds = "resid_pre, resid_post, attn_out, mlp_out" if not near and self._sites else ""
        hint = f" Hook points of a block are, among others, {kinds}: blocks.0.hook_resid_pre." if kinds else near
        raise HookPointError(f"The model has no hook point {name!r}.{hint}")

    def matching(self, pattern: str) -> list[str]:
        """Return the names that a pattern means, by layer: each `*` stands for a number."""
        shape = re.compile(re.escape(pattern).replace(re.escape("*"), r"(\d+)"))
        found = {
            name: tuple(int(n) for n in numbers.groups())
            for name in (*self._sites, *self._modules)
            if (numbers := shape.fullmatch(name))
        }
        return sorted(found, key=lambda name: found[name])


def layer_of(hook_name: str) -> int | None:
    """Return the block index in a hook name, or None.

    >>> layer_of("blocks.12.hook_resid_post")
    12
    """
    found = _LAYER.match(hook_name)
    return int(found.group(1)) if found else None


def moved_hook(hook: str) -> str:
    """Return where a hook point is moved: the model reads resid_mid for the MLP alone, what attention adds for all.

    >>> moved_hook("blocks.2.hook_resid_mid"), moved_hook("blocks.2.hook_resid_post")
    ('blocks.2.hook_attn_out', 'blocks.2.hook_resid_post')
    """
    return hook.replace("hook_resid_mid", "hook_attn_out")
