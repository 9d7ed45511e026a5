"""Patched attention patterns, as what the heads then put out: the donor's pattern times the base run's values.

A head's z is A V. With the donor's A and the base run's V it is A' V, so patching a pattern is patching z, and the
attention is not run again. That z = A V holds in this model is checked on the base run.
"""

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from mi_pipe.core.errors import StageError
from mi_pipe.models.hook_points import layer_of
from mi_pipe.models.lean import lean
from mi_pipe.models.model import Model
from mi_pipe.patching.recording import record

_SUFFIX = ".attn.hook_pattern"
_TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


def is_pattern(hook: str) -> bool:
    """Say whether a hook point is an attention pattern."""
    return hook.endswith(_SUFFIX)


def z_hook(hook: str) -> str:
    """Return the hook point of the heads' outputs beside a pattern's."""
    return hook.removesuffix(_SUFFIX) + ".attn.hook_z"


def z_of_patterns(
    model: Model, base: Int[Tensor, "pair pos"], donor: Int[Tensor, "pair pos"], hooks: list[str]
) -> dict[str, Float[Tensor, "pair pos width"]]:
    """Return by pattern hook the heads' outputs under the donor's patterns and the base run's values.

    Raises StageError where pattern times values is not what the heads put out (attention with sinks, for one).
    """
    values = [f"blocks.{layer_of(hook)}.attn.hook_v" for hook in hooks]
    with lean(model.module, with_patterns=True):
        _, seen = record(model, base, [*hooks, *values, *map(z_hook, hooks)])
        _, other = record(model, donor, hooks)
    found: dict[str, Tensor] = {}
    for hook, value in zip(hooks, values, strict=True):
        error = (_attended(seen[hook], seen[value], model) - seen[z_hook(hook)]).abs().max()
        if not error <= _TOLERANCES[model.dtype] * seen[z_hook(hook)].abs().max():
            raise StageError(
                f"{model.info.architecture}'s heads put out something else than pattern times values "
                f"(off by {float(error):.1e} in layer {layer_of(hook)}), so its patterns cannot be patched. "
                "Leave the unit pattern out."
            )
        found[hook] = _attended(other[hook], seen[value], model)
    return found


def _attended(
    pattern: Float[Tensor, "pair query head key"], values: Float[Tensor, "pair pos width"], model: Model
) -> Float[Tensor, "pair pos width"]:
    by_head = rearrange(values, "b s (kv d) -> b s kv d", kv=model.info.n_kv_heads)
    by_head = by_head.repeat_interleave(model.info.n_heads // model.info.n_kv_heads, dim=2)
    z = torch.einsum("bqhk,bkhd->bqhd", pattern.to(values.dtype), by_head)
    return rearrange(z, "b s h d -> b s (h d)")
