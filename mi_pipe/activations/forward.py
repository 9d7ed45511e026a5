"""The forward pass of a harvest: the values at some hook points and nothing after the last of them.

Fast path: native hooks on the plain model's own modules (SDPA attention); when the last value asked for is there,
a private exception ends the pass, so later layers and the unembedding never run. Hook points that only the
TransformerLens bridge has (split q, k, v of fused projections, normalised inputs) are read through its cache.
"""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from mi_pipe.activations.plan import Batch
from mi_pipe.activations.precision import Precision, computing
from mi_pipe.activations.storage_dtype import StoreDType, as_stored, torch_store_dtype
from mi_pipe.core.errors import StageError
from mi_pipe.models.model import Edit, Model


class _LastValueReached(Exception):  # noqa: N818 (not an error: it ends the pass early)
    """Raised within a hook when every value asked for is there."""


class ForwardPass:
    """Runs a model up to the last of some hook points."""

    def __init__(self, model: Model, hooks: Sequence[str], precision: Precision, store_dtype: StoreDType) -> None:
        """Read `hooks` of a model whose weights are already rounded to `precision`."""
        self.hooks = list(hooks)
        self._model = model
        self._precision: Precision = precision
        self._dtype = torch_store_dtype(store_dtype)
        self.needs_bridge = any(model.hooks[name].module_path is None for name in hooks)

    def rows(self, batch: Batch) -> dict[str, Shaped[np.ndarray, "row width"]]:
        """Run one batch and return the kept rows of each hook point as they are to be stored."""
        return self.stored(batch.tokens, batch.kept)

    def stored(
        self, tokens: Int[np.ndarray, "batch pos"], kept: Bool[np.ndarray, "batch pos"]
    ) -> dict[str, Shaped[np.ndarray, "row width"]]:
        """Run some prompts and return the kept rows of each hook point in the storage dtype."""
        return {name: as_stored(value) for name, value in self._run(tokens, kept, self._dtype).items()}

    def exact(
        self, tokens: Int[np.ndarray, "batch pos"], kept: Bool[np.ndarray, "batch pos"]
    ) -> dict[str, Float[np.ndarray, "row width"]]:
        """Run some prompts and return the kept rows of each hook point in float32, before any storage rounding."""
        return {name: value.numpy() for name, value in self._run(tokens, kept, torch.float32).items()}

    def _run(
        self, tokens: Int[np.ndarray, "batch pos"], kept: Bool[np.ndarray, "batch pos"], dtype: torch.dtype
    ) -> dict[str, Float[Tensor, "row width"]]:
        device = self._model.device
        collector = _Collector(self.hooks, torch.from_numpy(kept).to(device), dtype)
        ids = torch.from_numpy(tokens.astype(np.int64)).to(device)
        with torch.inference_mode(), computing(self._precision, device):
            if self.needs_bridge:
                self._run_bridge(ids, collector)
            else:
                self._run_plain(ids, collector)
        return {name: collector.values[name].cpu() for name in self.hooks}

    def _run_plain(self, ids: Int[Tensor, "batch pos"], collector: "_Collector") -> None:
        module = self._model.module
        options = {"use_cache": False} if hasattr(getattr(module, "config", None), "use_cache") else {}
        edits: dict[str, Edit] = {name: collector.hook(name) for name in self.hooks}
        try:
            with self._model.edited(edits):
                module(ids, **options)
        except _LastValueReached:
            return
        raise StageError(f"The model's forward pass did not reach the hook points {', '.join(collector.missing)}.")

    def _run_bridge(self, ids: Int[Tensor, "batch pos"], collector: "_Collector") -> None:
        # The cache, not run_with_hooks: it is what knows the bridge's aliases.
        wanted = set(self.hooks)
        layers = [self._model.hooks[name].layer for name in self.hooks]
        stop = (
            None if any(layer is None for layer in layers) else 1 + max(layer for layer in layers if layer is not None)
        )
        _, cache = self._model.bridge.run_with_cache(
            ids, names_filter=lambda name: name in wanted, stop_at_layer=stop, return_type=None
        )
        for name in self.hooks:
            collector.take(name, cache[name])


class _Collector:
    """Takes kept rows out of values as they appear, in the dtype they are stored in."""

    def __init__(self, hooks: list[str], kept: Bool[Tensor, "batch pos"], dtype: torch.dtype) -> None:
        self.values: dict[str, Float[Tensor, "row width"]] = {}
        self._hooks = hooks
        self._kept = kept
        self._all_kept = bool(kept.all())
        self._dtype = dtype

    @property
    def missing(self) -> list[str]:
        return [name for name in self._hooks if name not in self.values]

    def hook(self, name: str) -> Edit:
        def read(value: Tensor) -> None:
            self.take(name, value)
            if len(self.values) == len(self._hooks):
                raise _LastValueReached

        return read

    def take(self, name: str, value: Float[Tensor, "batch pos *shape"]) -> None:
        if value.shape[:2] != self._kept.shape:
            raise StageError(f"The value at {name!r} has shape {tuple(value.shape)}, not (batch, pos, ...).")
        flat = value.flatten(2)
        rows = flat.flatten(0, 1) if self._all_kept else flat[self._kept]
        # A copy even where the dtype is the same: the model may change its own tensor in place afterwards.
        self.values[name] = rows.to(self._dtype, copy=True)
