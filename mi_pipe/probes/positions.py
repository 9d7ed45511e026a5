"""Positions: at which rows of a prompt a probe reads, by a name.

- `all`: every row; `last`: the last row of each prompt; `each`: a probe for each position there is;
- a number: that position; `end`, `s2`, `subject`: where the prompt table's column `pos_<name>` says;
- anything else is a condition on rows, such as `token == ' and'`.
"""

import numpy as np
from jaxtyping import Bool, Int

from mi_pipe.activations.store import ActivationStore

_PREFIX = "pos_"


def check_positions(store: ActivationStore, names: tuple[str, ...], where: str | None) -> None:
    """Raise ConfigError for a name that means nothing."""
    for name in names:
        if (text := condition_of(store, name)) is not None:
            store.condition(text)
    if where is not None:
        store.condition(where)


def condition_of(store: ActivationStore, name: str) -> str | None:
    """Return the condition that a position stands for, None for all, last and each."""
    if name in ("all", "last", "each"):
        return None
    if name.isdecimal():
        return f"pos == {name}"
    column = _PREFIX + name
    return f"pos == {column}" if column in store.token_table.prompt_columns else name


def rows_at(store: ActivationStore, names: tuple[str, ...], where: str | None) -> dict[str, Int[np.ndarray, " row"]]:
    """Return the rows of each position, ascending, among those that fulfil `where`."""
    allowed = np.zeros(store.n_rows, bool)
    allowed[store.rows(where)] = True
    found: dict[str, Int[np.ndarray, " row"]] = {}
    for name in names:
        if name == "each":
            found |= {str(pos): np.flatnonzero(allowed & (store.pos == pos)) for pos in np.unique(store.pos[allowed])}
        else:
            found[name] = np.flatnonzero(allowed & _mask(store, name))
    return found


def _mask(store: ActivationStore, name: str) -> Bool[np.ndarray, " row"]:
    text = condition_of(store, name)
    mask = np.zeros(store.n_rows, bool)
    if text is not None:
        mask[store.rows(text)] = True
    elif name == "last":
        ends = store.prompt_offset[1:]
        mask[ends[ends > store.prompt_offset[:-1]] - 1] = True
    else:
        mask[:] = True
    return mask
