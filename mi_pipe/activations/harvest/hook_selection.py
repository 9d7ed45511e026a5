"""From the hook points a config names, patterns included, to sites of the model; wrong ones are refused by name."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
from jaxtyping import Int

from mi_pipe.activations.layout import ArrayLayout, chunk_rows_for
from mi_pipe.activations.storage_dtype import StoreDType, numpy_dtype
from mi_pipe.core.errors import ConfigError, HookPointError
from mi_pipe.models.hook_points import HookMap, HookSite
from mi_pipe.models.info import ModelInfo

_BRACES = re.compile(r"\{([^{}]*)\}")


def select_hooks(names: Iterable[str], hooks: HookMap) -> list[HookSite]:
    """Return the sites that names and patterns mean, each once, in the order asked for.

    `blocks.{3,7}.hook_resid_post` means layers 3 and 7, `blocks.*.hook_resid_post` every layer; paths of the model's
    own modules likewise (`model.layers.*.mlp.gate_proj`). Raises HookPointError for a name the model does not have,
    or one without a value at each token.
    """
    chosen = {name: hooks[name] for pattern in names for name in _expand(pattern, hooks)}
    for name, site in chosen.items():
        if not site.shape and site.pattern_heads is None:
            raise HookPointError(
                f"Hook point {name!r} has no value at each token, so it cannot be a row of an activation store."
            )
    return list(chosen.values())


def _expand(pattern: str, hooks: HookMap) -> list[str]:
    braces = _BRACES.search(pattern)
    if braces:
        parts = [part.strip() for part in braces.group(1).split(",")]
        return [
            name
            for part in parts
            for name in _expand(pattern[: braces.start()] + part + pattern[braces.end() :], hooks)
        ]
    # A pattern that means nothing is answered as its first layer would be.
    return (hooks.matching(pattern) or [pattern.replace("*", "0")]) if "*" in pattern else [pattern]


def at_lengths(sites: Sequence[HookSite], lengths: Int[np.ndarray, " prompt"]) -> list[HookSite]:
    """Give attention patterns the shape (head, key) that they have for prompts of just this length.

    Raises HookPointError if there are patterns and the prompts differ in length.
    """
    patterns = [site.name for site in sites if site.pattern_heads is not None]
    shortest, longest = int(lengths.min()), int(lengths.max())
    if patterns and shortest != longest:
        raise HookPointError(
            f"Hook point {patterns[0]!r}: a row of an attention pattern is (head, key), so all prompts need the same "
            f"length; these have {shortest:,} to {longest:,} tokens."
        )
    return [
        site if site.pattern_heads is None else replace(site, shape=(site.pattern_heads, longest)) for site in sites
    ]


def array_layouts(
    sites: Sequence[HookSite], info: ModelInfo | None, store_dtype: StoreDType, shard_rows: int
) -> tuple[ArrayLayout, ...]:
    """Return the layout of each site's array; `info` (of a language model) names their dimensions."""
    itemsize = numpy_dtype(store_dtype).itemsize
    return tuple(
        ArrayLayout(
            name=site.name,
            token_shape=site.shape,
            dimension=_dimension(site, info),
            store_dtype=store_dtype,
            chunk_rows=chunk_rows_for(site.width * itemsize, shard_rows),
            shard_rows=shard_rows,
        )
        for site in sites
    )


def check_shard_rows(shard_rows: int | None) -> None:
    """Raise ConfigError unless a configured shard is a power of two."""
    if shard_rows is not None and shard_rows & (shard_rows - 1):
        raise ConfigError(f"harvest.shard_rows is {shard_rows}; it has to be a power of two, such as 65536.")


def _dimension(site: HookSite, info: ModelInfo | None) -> str:
    """Name an array's second dimension; equal names have equal sizes, as xarray asks."""
    if site.pattern_heads is not None:
        return "head_key"
    if info is None:
        return f"width_{site.width}"
    named: dict[tuple[int | None, ...], str] = {
        (info.d_vocab,): "d_vocab",
        (info.d_mlp,): "d_mlp",
        (info.d_model,): "d_model",
        (info.n_kv_heads, info.d_head): "kv_head_d_head",
        (info.n_heads, info.d_head): "head_d_head",
    }
    return named.get(site.shape, f"width_{site.width}")
