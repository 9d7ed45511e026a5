"""Mean activations of tokens at several hook points, in one pass over the rows of these tokens.

    means = token_means(acts, [" Mary", " John"])
    cosine(means["mean"], "token")      # between tokens, at each hook point
    cosine(means["mean"], "hook")       # between hook points, of each token

Centring takes the mean of all rows away first. Without it cosines of a residual stream mostly tell of what all rows
have in common: a few dimensions far from zero bring any two of them near 1 (Mu and Viswanath 2018; Ethayarajh 2019).
"""

import numpy as np
import xarray as xr
from jaxtyping import Float, Int

from mi_pipe.activations.hook_choice import choose_hooks
from mi_pipe.activations.store import ActivationStore
from mi_pipe.core.errors import ConfigError, near_names

_BLOCK_ROWS = 4096


def token_means(
    store: ActivationStore,
    tokens: str | list[str],
    *,
    hooks: str | list[str] | None = None,
    where: str | None = None,
    centred: bool = True,
) -> xr.Dataset:
    """Return `mean` (hook, token, d) in float64 and `n_rows` (hook, token) of the rows that are just these tokens.

    A token is written with its leading space: " Mary"; one that comes twice is taken once. Rows massive at a hook point
    are left out there; `where` picks among the rows; `centred` takes the mean of all the rows that it picks away.
    Raises ConfigError for no tokens, for a token without rows and for hook points of several widths, HookPointError for
    one that is not stored.
    """
    tokens = [tokens] if isinstance(tokens, str) else list(dict.fromkeys(tokens))
    if not tokens:
        raise ConfigError("token_means needs at least one token.")
    chosen = choose_hooks(hooks, store)
    width = common_width(store, chosen)
    rows, which = _rows_of(store, tokens, where)
    means = np.empty((len(chosen), len(tokens), width))
    counts = np.empty((len(chosen), len(tokens)), np.int64)
    for place, hook in enumerate(chosen):
        kept = ~store.massive(hook)[rows]
        means[place], counts[place] = _means(store, hook, rows[kept], which[kept], len(tokens))
        if centred:
            means[place] -= store.statistics(hook).mean if where is None else store.mean(hook, where)
    coordinates = {"hook": chosen, "token": tokens}
    figures = {"mean": (("hook", "token", "d"), means), "n_rows": (("hook", "token"), counts)}
    return xr.Dataset(figures, coordinates, {"store": store.id, "where": where or "", "centred": int(centred)})


def cosine(means: xr.DataArray, dim: str) -> xr.DataArray:
    """Return the cosine of the vectors (along d) of each two entries of `dim`, as (…, dim, other_<dim>).

    >>> vectors = xr.DataArray([[1.0, 0.0], [1.0, 1.0]], dims=("token", "d"))
    >>> cosine(vectors, "token").round(3).values.tolist()
    [[1.0, 0.707], [0.707, 1.0]]
    """
    unit = means / (means**2).sum("d") ** 0.5
    return xr.dot(unit, unit.rename({dim: f"other_{dim}"}), dim="d").rename("cosine")


def common_width(store: ActivationStore, hooks: list[str]) -> int:
    """Return the width that hook points have in common; raises ConfigError if there are several."""
    widths = {hook: store.width(hook) for hook in hooks}
    if len(set(widths.values())) > 1:
        told = ", ".join(f"{hook} {width}" for hook, width in widths.items())
        raise ConfigError(f"Cosines compare hook points of one width; these have several ({told}). CKA compares any.")
    return next(iter(widths.values()))


def _rows_of(
    store: ActivationStore, tokens: list[str], where: str | None
) -> tuple[Int[np.ndarray, " row"], Int[np.ndarray, " row"]]:
    """Return the rows of the tokens, ascending, and which token each is."""
    condition = f"token in {tokens!r}"
    rows = store.rows(condition if where is None else f"({where}) and {condition}")
    texts = store.token_table.take(rows, ["text"])["text"].astype(str).to_numpy()
    which = np.full(len(rows), -1)
    for place, token in enumerate(tokens):
        found = texts == token
        if not found.any():
            near = near_names(token, store.table(["text"])["text"].astype(str).unique())
            raise ConfigError(f"No row of {store.id} is the token {token!r}{f' where {where}' if where else ''}.{near}")
        which[found] = place
    return rows, which


def _means(
    store: ActivationStore, hook: str, rows: Int[np.ndarray, " row"], which: Int[np.ndarray, " row"], n_tokens: int
) -> tuple[Float[np.ndarray, "token d"], Int[np.ndarray, " token"]]:
    total, counts = np.zeros((n_tokens, store.width(hook))), np.bincount(which, minlength=n_tokens)
    for start in range(0, len(rows), _BLOCK_ROWS):
        part = slice(start, start + _BLOCK_ROWS)
        is_token = which[part] == np.arange(n_tokens)[:, None]
        total += is_token.astype(np.float64) @ store.take(hook, rows[part])
    with np.errstate(invalid="ignore"):
        return total / counts[:, None], counts
