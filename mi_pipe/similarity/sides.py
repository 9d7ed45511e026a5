"""The two sides of a comparison: rows that two stores (or a store and itself) have of the same tokens, and hook points.

Rows of two stores belong together if they are the same position of the same prompt, and then have to be the same token:
two harvests of one prompt set, of two models with one tokenizer. What only one of them has, such as BOS, is left out.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Float, Int

from mi_pipe.activations.hook_choice import choose_hooks
from mi_pipe.activations.store import ActivationStore
from mi_pipe.core.errors import ConfigError

_BLOCK_ROWS = 1024


@dataclass(frozen=True)
class Side:
    """Some hook points of a store at some of its rows, in the order in which both sides are compared."""

    store: ActivationStore
    hooks: list[str]
    rows: Int[np.ndarray, " row"]

    @property
    def prompts(self) -> Int[np.ndarray, " row"]:
        """Prompt of each row."""
        return self.store.prompt_idx[self.rows]

    def read(self, hook: str, start: int = 0, stop: int | None = None) -> Float[np.ndarray, "row width"]:
        """Return the values of some of the rows, or of all, float32."""
        return self.store.take(hook, self.rows[start:stop])

    def at(self, chosen: Int[np.ndarray, " chosen"] | Bool[np.ndarray, " row"]) -> "Side":
        """Return the side with some of its rows."""
        return replace(self, rows=self.rows[chosen])


def compared_sides(
    store: ActivationStore,
    other: ActivationStore | None = None,
    hooks: str | list[str] | None = None,
    other_hooks: str | list[str] | None = None,
    where: str | None = None,
    with_massive: bool = False,
) -> tuple[Side, Side]:
    """Return the rows of `store` that `where` picks and the same tokens of `other` (default: `store` itself).

    `hooks` are names or patterns (`blocks.*.hook_resid_post`) of `store`, default all; `other_hooks` those of `other`
    or, where there is none, of `store` on the second side (default `hooks`). Rows that are massive at any hook point
    that is compared are left out unless `with_massive`: one of them outweighs thousands of others in every sum of
    products. Raises ConfigError if the stores have different tokens at a place, or no row is left, HookPointError for
    hook points that are not stored.
    """
    other_hooks = other_hooks if other is not None or other_hooks is not None else hooks
    second = store if other is None else other
    chosen, other_chosen = choose_hooks(hooks, store), choose_hooks(other_hooks, second)
    picked = np.zeros(store.n_rows, bool)
    picked[store.rows(where)] = True
    allowed = np.ones(second.n_rows, bool)
    if not with_massive:
        picked &= ~_massive(store, chosen)
        allowed &= ~_massive(second, other_chosen)
    rows, other_rows = _same_tokens(store, second)
    kept = picked[rows] & allowed[other_rows]
    if not kept.any():
        wanted = f"fulfils {where!r}" if where else "is left"
        without = "" if with_massive else " without being massive"
        both = "" if second is store else f" that {second.id} has too"
        raise ConfigError(f"No row of {store.id}{both} {wanted}{without}.")
    return Side(store, chosen, rows[kept]), Side(second, other_chosen, other_rows[kept])


def blocks(n_rows: int) -> Iterator[slice]:
    """Yield consecutive slices of rows to read at once."""
    for start in range(0, n_rows, _BLOCK_ROWS):
        yield slice(start, min(start + _BLOCK_ROWS, n_rows))


def _massive(store: ActivationStore, hooks: list[str]) -> Bool[np.ndarray, " row"]:
    return np.logical_or.reduce([store.massive(hook) for hook in hooks])


def _same_tokens(
    first: ActivationStore, second: ActivationStore
) -> tuple[Int[np.ndarray, " row"], Int[np.ndarray, " row"]]:
    """Return the rows of both stores at the places (prompt and position) that both have."""
    if first is second or first.path == second.path:
        return np.arange(first.n_rows), np.arange(first.n_rows)
    longest = 1 + max(int(first.pos.max()), int(second.pos.max()))
    places = [store.prompt_idx.astype(np.int64) * longest + store.pos for store in (first, second)]
    _, rows, other_rows = np.intersect1d(*places, assume_unique=True, return_indices=True)
    differs = np.flatnonzero(first.token_id[rows] != second.token_id[other_rows])
    if len(differs):
        row = int(rows[differs[0]])
        raise ConfigError(
            f"{first.id} and {second.id} are of different tokens (prompt {first.prompt_idx[row]}, position "
            f"{first.pos[row]} is token {first.token_id[row]} in one and "
            f"{second.token_id[other_rows[differs[0]]]} in the other). Rows belong together where two models read the "
            "same tokens: harvest both on one prompt set, which takes models of one tokenizer."
        )
    return rows, other_rows
