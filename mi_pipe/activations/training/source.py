"""Where training rows come from: one store, or two of the same tokens side by side (two models, say)."""

import numpy as np
from jaxtyping import Bool, Float, Int

from mi_pipe.activations.row_array import RowArray
from mi_pipe.activations.statistics import HookStatistics
from mi_pipe.activations.store import ActivationStore
from mi_pipe.core.errors import ConfigError

OTHER = "other:"
"""What hook points of the second store begin with."""


class JoinedStores:
    """Two stores of the same tokens as one; hook points of the second are named `other:hook`."""

    def __init__(self, first: ActivationStore, other: ActivationStore) -> None:
        """Put two stores side by side; raises ConfigError unless row i is the same token of the same prompt in both."""
        self._first = first
        self._other = other
        pairs = ((first.token_id, other.token_id), (first.prompt_idx, other.prompt_idx), (first.pos, other.pos))
        if first.n_rows != other.n_rows or not all(np.array_equal(mine, theirs) for mine, theirs in pairs):
            raise ConfigError(
                f"saes.other_store: rows of {other.id} are other tokens than those of {first.id}. Harvest both models "
                "on the same prompts, with the same positions and keep_bos."
            )
        self.id = first.id
        self.digest = f"{first.digest}+{other.digest}"
        self.hooks = [*first.hooks, *(OTHER + hook for hook in other.hooks)]
        self.n_rows = first.n_rows
        self.group_place = first.group_place
        self.prompt_idx = first.prompt_idx
        self.pos = first.pos
        self.rows = first.rows
        self.prompt_split = first.prompt_split

    def _of(self, hook: str) -> tuple[ActivationStore, str]:
        if hook.startswith(OTHER):
            return self._other, hook.removeprefix(OTHER)
        return self._first, hook

    def width(self, hook: str) -> int:
        """Return the width of a hook point."""
        store, name = self._of(hook)
        return store.width(name)

    def array(self, hook: str) -> RowArray:
        """Return a hook point's array."""
        store, name = self._of(hook)
        return store.array(name)

    def read_rows(self, hook: str, start: int, stop: int) -> Float[np.ndarray, "row width"]:
        """Return rows `start` to `stop` (exclusive) in float32."""
        store, name = self._of(hook)
        return store.read_rows(name, start, stop)

    def take(self, hook: str, rows: Int[np.ndarray, " row"]) -> Float[np.ndarray, "row width"]:
        """Return some rows."""
        store, name = self._of(hook)
        return store.take(name, rows)

    def massive(self, hook: str) -> Bool[np.ndarray, " row"]:
        """Say which rows are massive."""
        store, name = self._of(hook)
        return store.massive(name)

    def statistics(self, hook: str) -> HookStatistics:
        """Return a hook point's statistics."""
        store, name = self._of(hook)
        return store.statistics(name)


RowSource = ActivationStore | JoinedStores
"""What training and evaluation read."""


def widths_of(source: RowSource) -> dict[str, int]:
    """Return the width of each hook point."""
    return {hook: source.width(hook) for hook in source.hooks}
