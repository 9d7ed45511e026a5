"""The forward pass over a plain array of inputs, through any torch module: one row an item."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Shaped
from torch import Tensor, nn

from mi_pipe.activations.harvest.collecting import Collector, LastValueReachedError, PendingRows
from mi_pipe.activations.harvest.forward import within_memory
from mi_pipe.activations.harvest.plan import Batch
from mi_pipe.activations.storage_dtype import StoreDType, torch_store_dtype
from mi_pipe.core.errors import StageError
from mi_pipe.models.hook_points import HookSite
from mi_pipe.models.reading import listening


class ItemPass:
    """Runs a module on batches of an array of inputs, up to the last of some hook points."""

    def __init__(
        self, module: nn.Module, items: Shaped[Tensor, "item *shape"], sites: Sequence[HookSite], dtype: StoreDType
    ) -> None:
        """Read `sites` of `module`, which is run as it is (mode, dtype, device); item i becomes row i."""
        self._module = module
        self._items = items
        self._readings = {site.name: site.reading for site in sites if site.reading is not None}
        self._dtype = torch_store_dtype(dtype)
        self._device = next((p.device for p in module.parameters()), items.device)
        self.n_ahead = int(self._device.type == "cuda")

    def start(self, batch: Batch) -> PendingRows:
        """Begin a batch of the plan, in which every item is a prompt of one token."""
        items = self._items[torch.from_numpy(batch.rows)]
        kept = np.ones(len(batch.rows), bool)
        collector = Collector(list(self._readings), list(self._readings), kept, self._dtype, self._device)
        try:
            with within_memory(batch.tokens), torch.inference_mode():
                with listening(self._module, self._readings, collector):
                    self._module(items.to(self._device, non_blocking=True))
                raise StageError(f"The module's forward pass did not compute {', '.join(collector.missing)}.")
        except LastValueReachedError:
            return collector.rows()
