"""Takes the kept rows out of a model's values as they appear, rounds them to the storage dtype, and brings them home.

On a GPU the copies to the host are asynchronous and go into pinned memory: the next batch can be started before the
rows of this one are asked for, and the device never waits for the host.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from mi_pipe.activations.storage_dtype import as_stored
from mi_pipe.core.errors import StageError


class LastValueReachedError(Exception):
    """Raised within a hook when every value asked for is there; it ends the pass and is no error for anyone else."""


class PendingRows:
    """Rows of one batch, perhaps still on their way to the host."""

    def __init__(self, values: dict[str, Float[Tensor, "row width"]]) -> None:
        """Begin to copy what lies on a GPU."""
        self._values = {name: _to_host(value) for name, value in values.items()}
        self._arrived: torch.cuda.Event | None = None
        if any(value.is_cuda for value in values.values()):
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def result(self) -> dict[str, Shaped[np.ndarray, "row width"]]:
        """Wait for the rows and return them as they are to be stored."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return {name: as_stored(value) for name, value in self._values.items()}


def _to_host(value: Tensor) -> Tensor:
    if not value.is_cuda:
        return value.cpu()
    host = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
    return host.copy_(value, non_blocking=True)


class Collector:
    """Collects the rows of some hook points during one pass."""

    def __init__(
        self,
        names: Sequence[str],
        listened: Sequence[str],
        kept: Bool[np.ndarray, "*items"],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Collect `names`, the pass being over when all of `listened` have come.

        `kept` says which items (batch, pos), or which inputs (batch), become rows.
        """
        self.names = names
        self._waiting = set(listened)
        self._taken: dict[str, Float[Tensor, "row width"]] = {}
        self._axes = kept.shape
        self._dtype = dtype
        # Row numbers, found on the host: indexing by a mask would make a GPU wait.
        places = None if kept.all() else torch.from_numpy(np.flatnonzero(kept))
        self._places = places if places is None else places.to(device, non_blocking=True)

    @property
    def missing(self) -> list[str]:
        """Names whose values have not appeared yet."""
        return [name for name in self.names if name not in self._taken]

    def __call__(self, name: str, value: Tensor) -> None:
        """Take a value; raises LastValueReachedError when it was the last."""
        self.take(name, value)
        self._waiting.discard(name)
        if not self._waiting:
            raise LastValueReachedError

    def take(self, name: str, value: Float[Tensor, "*items_and_shape"]) -> None:
        """Take the rows of one value; raises StageError unless its first axes are those of the items."""
        n_axes, n_items = len(self._axes), math.prod(self._axes)
        if value.shape[0] == n_items and value.shape[:n_axes] != self._axes:
            value = value.unflatten(0, self._axes)  # OPT runs its MLPs on (batch pos) in one axis
        if value.shape[0] == 1 and self._axes[0] > 1:
            # Learned position embeddings are computed once for all prompts of a batch.
            value = value.expand(self._axes[0], *value.shape[1:])
        if value.shape[:n_axes] != self._axes:
            raise StageError(
                f"The value at {name!r} has shape {tuple(value.shape)}, which does not begin with the axes "
                f"{tuple(self._axes)} of the items it was computed from."
            )
        rows = value.reshape(n_items, -1)
        if self._places is not None:
            rows = rows.index_select(0, self._places)
        # A copy even where the dtype is the same: the model may change its own tensor in place afterwards.
        self._taken[name] = rows.to(self._dtype, copy=True)

    def rows(self) -> PendingRows:
        """Return the rows, in the order of the names."""
        return PendingRows({name: self._taken[name] for name in self.names})
