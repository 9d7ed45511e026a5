"""Lists a language model's hook points by TransformerLens' names, before any weights are read.

The TransformerLens bridge is built around the model on torch's meta device and run once, which gives every name and
shape. Each hook point that is the input or output of one of the model's own modules is noted with that module's path,
each that follows from one by a fixed rule with that rule (mi_pipe/models/reading.py). Both are read on the plain model,
the first also patched there; only what is left (rotated q and k, attention scores) needs the bridge.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from mi_pipe.models.hook_points import HookMap, HookSite
from mi_pipe.models.module_sites import PATTERN_SUFFIX
from mi_pipe.models.reading import Columns, Normalized, Reading, Rule

_PROBE_BATCH = 2
_PROBE_POSITIONS = 3
_SEQUENCE_DIMS = 2
_PATTERN_DIMS = 4
_PARTS = (".hook_q", ".hook_k", ".hook_v")
_TELLING_COLUMNS = 8
"""Random weights of this many columns tell the rows of a projection apart."""


def probe_tokens(device: Any) -> Tensor:
    """Return the tokens of which hook points are listed: the fewest that tell batch from pos."""
    return torch.zeros(_PROBE_BATCH, _PROBE_POSITIONS, dtype=torch.long, device=device)


def map_hooks(bridge: Any, module_paths: dict[int, str], modules: Iterable[HookSite] = ()) -> HookMap:
    """Run a bridge once (weights and data are not looked at) and list its hook points.

    `module_paths` maps `id(module)` of the model's own modules, taken before the bridge wrapped them, to
    their paths; `modules` are the sites named by such paths.
    """
    with torch.no_grad():
        _, cache = bridge.run_with_cache(probe_tokens(bridge.cfg.device))
    hooks = bridge.hook_dict
    by_module = HookMap((), modules)
    sites = [_site(bridge, name, tuple(value.shape), hooks, module_paths) for name, value in cache.items()]
    return HookMap([_pattern(site, by_module) for site in sites], by_module.modules)


def has_unknown_parts(hooks: HookMap) -> bool:
    """Say whether there are q, k or v of a fused projection that could not be told apart, as on the meta device."""
    return any(site.shape and site.reading is None and site.name.endswith(_PARTS) for site in hooks)


def with_vocabulary(hooks: HookMap, listed: int, d_vocab: int) -> HookMap:
    """Give logits, listed with a smaller vocabulary, the size of the model's own."""

    def true_size(site: HookSite) -> HookSite:
        return replace(site, shape=(d_vocab,)) if site.shape == (listed,) else site

    return HookMap(map(true_size, hooks), map(true_size, hooks.modules))


def repeat_last_layer(hooks: HookMap, n_listed: int, n_layers: int) -> HookMap:
    """Give the sites of the last of `n_listed` layers to every layer up to `n_layers`."""
    block = hooks[f"blocks.{n_listed - 1}.hook_out"].module_path
    assert block is not None, "a block is always one module"
    stem, extra = block.rpartition(".")[0], range(n_listed, n_layers)

    def further(site: HookSite, layer: int) -> HookSite:
        name = site.name.replace(f"blocks.{n_listed - 1}.", f"blocks.{layer}.", 1)
        derived = site.derived and replace(site.derived, module_path=moved(site.derived.module_path, layer))
        return replace(
            site, name=name, module_path=site.module_path and moved(site.module_path, layer), derived=derived
        )

    def moved(path: str, layer: int) -> str:
        return f"{stem}.{layer}{path.removeprefix(block)}" if is_within(path) else path

    def is_within(path: str) -> bool:
        return path == block or path.startswith(f"{block}.")

    sites = [further(site, layer) for layer in extra for site in hooks if site.layer == n_listed - 1]
    modules = [
        replace(further(site, layer), name=moved(site.name, layer))
        for layer in extra
        for site in hooks.modules
        if is_within(site.name)
    ]
    return HookMap([*hooks, *sites], [*hooks.modules, *modules])


def _site(bridge: Any, name: str, shape: tuple[int, ...], hooks: dict[str, Any], paths: dict[int, str]) -> HookSite:
    canonical = hooks[name].name if name in hooks else name
    component_path, _, hook = canonical.rpartition(".")
    has_positions = len(shape) > _SEQUENCE_DIMS and shape[:_SEQUENCE_DIMS] == (_PROBE_BATCH, _PROBE_POSITIONS)
    token_shape = shape[_SEQUENCE_DIMS:] if has_positions else ()
    site = HookSite(name, token_shape, None, "in" if hook == "hook_in" else "out")
    path = _module_path(bridge, component_path, paths)
    if hook == "hook_pattern" and len(shape) == _PATTERN_DIMS:
        return replace(site, derived=path and Reading(path, "pattern"), pattern_heads=shape[1])
    if hook in ("hook_in", "hook_out") and path is not None:
        # The bridge repeats learned position embeddings over the batch; the module's own value has no batch axis,
        # so it can be read, but not replaced.
        is_shared = component_path == "pos_embed"
        return replace(site, derived=Reading(path, site.side)) if is_shared else replace(site, module_path=path)
    return replace(site, derived=_derived(bridge, component_path, hook, paths))


def _module_path(bridge: Any, component_path: str, paths: dict[int, str]) -> str | None:
    """Return the path of the module that a component wraps, or None if it wraps none of its own."""
    wrapped = getattr(_resolve(bridge, component_path), "original_component", None)
    parent = _resolve(bridge, component_path.rpartition(".")[0])
    # OPT's MLP is part of its block: the bridge's component for it wraps the block once more.
    return None if wrapped is getattr(parent, "original_component", None) else paths.get(id(wrapped))


def _pattern(site: HookSite, modules: HookMap) -> HookSite:
    """Leave a pattern to the bridge where the model's own attention module does not return it."""
    if site.pattern_heads is None or site.derived is None:
        return site
    return site if f"{site.derived.module_path}{PATTERN_SUFFIX}" in modules else replace(site, derived=None)


def _derived(bridge: Any, component_path: str, hook: str, paths: dict[int, str]) -> Reading | None:
    """Return how a value that is no module's own follows from a module's, or None if it does so by no known rule."""
    component, path = _resolve(bridge, component_path), _module_path(bridge, component_path, paths)
    if hook in ("hook_normalized", "hook_scale") and path is not None:
        rule = _normalization(component, hook == "hook_scale")
        return None if rule is None else Reading(path, "in", rule)
    if hook in ("hook_in", "hook_out") and path is None:
        parent = _resolve(bridge, component_path.rpartition(".")[0])
        return _part_of_fused(parent, component, hook, paths)
    return None


def _normalization(component: Any, is_scale: bool) -> Rule | None:
    """Return what the bridge computes at a norm, with the epsilon it takes (its two paths take different ones)."""
    from transformer_lens.model_bridge.generalized_components.normalization import NormalizationBridge

    if not isinstance(component, NormalizationBridge) or type(component).forward is not NormalizationBridge.forward:
        return None
    norm = component.original_component
    if isinstance(norm, nn.Identity):
        return None
    eps = getattr(component.config, "eps", 1e-5)
    if component.use_native_layernorm_autograd or getattr(component.config, "layer_norm_folding", False):
        own = getattr(norm, "eps", None)
        eps = own if own is not None else getattr(norm, "variance_epsilon", eps)
    return None if isinstance(eps, Tensor) else Normalized(float(eps), not component.uses_rms_norm, is_scale)


def _part_of_fused(parent: Any, component: Any, hook: str, paths: dict[int, str]) -> Reading | None:
    """Find a projection that the bridge has cut out of a fused one, by its weights (random ones tell them apart)."""
    part = getattr(getattr(component, "original_component", None), "weight", None)
    for sibling in getattr(parent, "submodules", {}).values():
        fused = getattr(sibling, "original_component", None)
        path, weight = paths.get(id(fused)), getattr(fused, "weight", None)
        if path is None or not isinstance(weight, Tensor) or not isinstance(part, Tensor):
            continue
        rows = weight.T if type(fused).__name__ == "Conv1D" else weight
        indices = _matching_rows(part, rows)
        if indices is not None:
            return Reading(path, "in") if hook == "hook_in" else Reading(path, "out", Columns(indices))
    return None


def _matching_rows(part: Float[Tensor, "some d_in"], whole: Float[Tensor, "all d_in"]) -> tuple[int, ...] | None:
    """Return which rows of `whole` are the rows of `part`, or None if not all are just one of them."""
    if part.is_meta or whole.is_meta or part.ndim != whole.ndim or part.shape[-1] != whole.shape[-1]:
        return None
    places = {row.tobytes(): i for i, row in enumerate(_telling(whole))}
    found = [places.get(row.tobytes()) for row in _telling(part)]
    is_clear = len(places) == len(whole) and len(set(found)) == len(found)
    return tuple(i for i in found if i is not None) if is_clear and None not in found else None


def _telling(weight: Float[Tensor, "row d_in"]) -> Float[np.ndarray, "row few"]:
    return weight.detach()[:, :_TELLING_COLUMNS].float().contiguous().numpy()


def _resolve(root: Any, path: str) -> Any:
    for part in path.split("."):
        root = root[int(part)] if part.isdigit() else getattr(root, part, None)
        if root is None:
            return None
    return root
