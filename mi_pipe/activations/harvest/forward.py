"""The forward pass of a harvest: the values at some hook points and nothing after the last of them.

Fast path: native hooks on the plain model's own modules (SDPA attention); when the last value asked for is there,
a private exception ends the pass, so later layers and the unembedding never run. The few hook points that only the
TransformerLens bridge has (rotated q and k) are read through its cache.
"""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Protocol

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from mi_pipe.activations.harvest.collecting import Collector, LastValueReachedError, PendingRows
from mi_pipe.activations.harvest.plan import Batch
from mi_pipe.activations.harvest.precision import Precision, computing, round_weights
from mi_pipe.activations.storage_dtype import StoreDType, torch_store_dtype
from mi_pipe.core.errors import StageError
from mi_pipe.models.info import ModelInfo
from mi_pipe.models.lean import lean
from mi_pipe.models.model import Model
from mi_pipe.models.reading import Reading, listening
from mi_pipe.models.source import ModelSource, load_source


class BatchTooLargeError(StageError):
    """A batch of the plan does not fit into the device's memory."""


class RowSource(Protocol):
    """What computes the rows of a plan's batches."""

    n_ahead: int
    """How many batches are worth starting before the rows of one are there."""

    def start(self, batch: Batch) -> PendingRows:
        """Begin a batch; raises BatchTooLargeError."""
        ...


class ForwardPass:
    """Runs a language model up to the last of some hook points."""

    def __init__(self, model: Model, hooks: Sequence[str], precision: Precision, store_dtype: StoreDType) -> None:
        """Read `hooks` of a model whose weights are already rounded to `precision`."""
        self.hooks = list(hooks)
        self._model = model
        self._precision: Precision = precision
        self._dtype = torch_store_dtype(store_dtype)
        readings = {name: model.hooks[name].reading for name in hooks}
        self._plain: dict[str, Reading] = {name: found for name, found in readings.items() if found is not None}
        self._bridged = [name for name in hooks if name not in self._plain]
        self.n_ahead = int(model.device.type == "cuda")
        self._with_patterns = any(reading.side == "pattern" for reading in self._plain.values())

    @property
    def info(self) -> ModelInfo:
        """Sizes of the model."""
        return self._model.info

    @property
    def needs_bridge(self) -> bool:
        """Say whether a hook point is there that only TransformerLens' bridge has."""
        return bool(self._bridged)

    def start(self, batch: Batch) -> PendingRows:
        """Begin a batch of the plan; its rows come in the storage dtype. Raises BatchTooLargeError."""
        return self._run(batch.tokens, batch.kept, self._dtype)

    def rows(self, batch: Batch) -> dict[str, Shaped[np.ndarray, "row width"]]:
        """Run one batch and return the kept rows of each hook point as they are to be stored."""
        return self.start(batch).result()

    def stored(
        self, tokens: Int[np.ndarray, "batch pos"], kept: Bool[np.ndarray, "batch pos"]
    ) -> dict[str, Shaped[np.ndarray, "row width"]]:
        """Run some prompts and return the kept rows of each hook point in the storage dtype."""
        return self._run(tokens, kept, self._dtype).result()

    def exact(
        self, tokens: Int[np.ndarray, "batch pos"], kept: Bool[np.ndarray, "batch pos"]
    ) -> dict[str, Float[np.ndarray, "row width"]]:
        """Run some prompts and return the kept rows of each hook point in float32, before any storage rounding."""
        return self._run(tokens, kept, torch.float32).result()

    def _run(
        self, tokens: Int[np.ndarray, "batch pos"], kept: Bool[np.ndarray, "batch pos"], dtype: torch.dtype
    ) -> PendingRows:
        device = self._model.device
        collector = Collector(self.hooks, list(self._plain), kept, dtype, device)
        ids = torch.from_numpy(tokens.astype(np.int64))
        with within_memory(tokens), torch.inference_mode(), computing(self._precision, device):
            ids = ids.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else ids.to(device)
            if self._plain:
                self._run_plain(ids, collector)
            if self._bridged:
                self._run_bridge(ids, collector)
            return collector.rows()

    def _run_plain(self, ids: Int[Tensor, "batch pos"], collector: Collector) -> None:
        module = self._model.module
        try:
            with lean(module, self._with_patterns) as options, listening(module, self._plain, collector):
                module(ids, **options)
        except LastValueReachedError:
            return
        self._leave_patterns_to_bridge([name for name in collector.missing if name in self._plain])

    def _leave_patterns_to_bridge(self, missing: list[str]) -> None:
        """Read patterns from the bridge that the model's attention does not return (Falcon); raise for other values."""
        if any(self._plain[name].side != "pattern" or self._model.hooks.is_module(name) for name in missing):
            raise StageError(f"The model's forward pass did not compute {', '.join(missing)}.")
        self._bridged += missing
        self._plain = {name: reading for name, reading in self._plain.items() if name not in missing}

    def _run_bridge(self, ids: Int[Tensor, "batch pos"], collector: Collector) -> None:
        # The cache, not run_with_hooks: it is what knows the bridge's aliases.
        wanted = set(self._bridged)
        layers = [self._model.hooks[name].layer for name in self._bridged]
        stop = (
            None if any(layer is None for layer in layers) else 1 + max(layer for layer in layers if layer is not None)
        )
        _, cache = self._model.bridge.run_with_cache(
            ids, names_filter=lambda name: name in wanted, stop_at_layer=stop, return_type=None
        )
        for name in self._bridged:
            value = cache[name]
            # Patterns come as (batch, head, query, key); a row is one query token.
            is_pattern = self._model.hooks[name].pattern_heads is not None
            collector.take(name, value.transpose(1, 2) if is_pattern else value)


@contextmanager
def within_memory(inputs: Shaped[np.ndarray, "batch *shape"]) -> Generator[None]:
    """Turn an out-of-memory error into BatchTooLargeError, which says which batch it was."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise BatchTooLargeError(
            f"A batch of {inputs.shape[0]} prompts of {inputs.shape[1]} tokens does not fit into the device's memory."
        ) from error


def load_pass(
    source: ModelSource, hooks: Sequence[str], precision: Precision, store_dtype: StoreDType, device: str
) -> ForwardPass:
    """Load a model, round its weights to `precision`, and return the pass that reads `hooks`."""
    model = load_source(source, device, "float32")
    round_weights(model.module, precision)
    return ForwardPass(model, hooks, precision, store_dtype)
