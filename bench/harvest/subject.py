"""What is measured in this process: one harvest, and the same prompts through the bare model and TransformerLens.

Everything gets the same batches. The bare forward pass is HuggingFace's own base model with the layers after the last
hook point taken off: no hooks, no unembedding, no key/value cache, nothing kept. A harvest begins with the group and
ends with every shard durable, statistics and tables written; loading the model and measuring the precision of a sample,
which do not grow with the number of tokens, are left out.
"""

import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn

from bench.harvest.clock import Speed, timed
from mi_pipe.activations.harvest.fallback import Fallback
from mi_pipe.activations.harvest.filling import HarvestJob
from mi_pipe.activations.harvest.finishing import finish_store
from mi_pipe.activations.harvest.forward import ForwardPass
from mi_pipe.activations.harvest.precision import computing, pick_precision, round_weights
from mi_pipe.activations.row_table import row_table
from mi_pipe.core.workspace import Workspace
from mi_pipe.models.device import pick_device
from mi_pipe.models.source import load_source
from stages.harvest_plan import HarvestConfig, Inputs, make_plan


class Subject:
    """A harvest's config, and the ways to run its prompts."""

    def __init__(self, config: HarvestConfig, inputs: Inputs, folder: Path) -> None:
        self._config = config
        self._folder = folder
        self.precision = pick_precision(config.precision, pick_device(config.device))
        self._model = load_source(inputs.model, config.device, "float32")
        round_weights(self._model.module, self.precision)
        self._plan = make_plan(config, inputs, Fallback(config.store_dtype))
        self._hooks = [array.name for array in self._plan.layout.arrays]
        self._last_layer = max(self._model.hooks[name].layer or 0 for name in self._hooks)

    @property
    def n_batch(self) -> int:
        """Prompts of a batch."""
        return self._plan.largest_batch

    @property
    def n_tokens(self) -> int:
        return self._plan.layout.n_rows

    def bare(self) -> Speed:
        """Run the truncated base model over the plan's batches."""
        with self._truncated() as base, torch.inference_mode(), computing(self.precision, self._model.device):
            return timed(self.n_tokens, lambda: self._run_all(base))

    def harvest(self) -> Speed:
        """Fill a store."""
        try:
            return timed(self.n_tokens, self._fill)
        finally:
            shutil.rmtree(self._folder / "made", ignore_errors=True)

    def transformer_lens(self) -> Speed:
        """Cache every batch with TransformerLens and write each of its hook points as .npy."""
        target = self._folder / "npy"
        target.mkdir()
        try:
            with torch.inference_mode(), computing(self.precision, self._model.device):
                return timed(self.n_tokens, lambda: self._cache_all(target))
        finally:
            shutil.rmtree(target)

    def _fill(self) -> None:
        made, config = self._folder / "made", self._config
        work = Workspace("bench", made / "artifact", made / "scratch")
        job = HarvestJob(self._plan, work.place_at(None), work.scratch_at(None))
        job.prepare(made / "group", {})
        layout = self._plan.layout
        job.fill(ForwardPass(self._model, self._hooks, self.precision, config.store_dtype), range(layout.n_shards))
        texts = pd.Series(self._plan.tokens.ids.astype(str)).astype("category")
        finish_store(
            work,
            job.place,
            job.scratch,
            layout,
            job.commits().values(),
            config.massive_factor,
            lambda massive: row_table(self._plan.tokens, texts, massive),
        )

    def _run_all(self, base: nn.Module) -> None:
        for number in range(self._plan.n_batches):
            base(self._ids(number), use_cache=False)

    def _cache_all(self, target: Path) -> None:
        bridge = self._model.bridge
        for number in range(self._plan.n_batches):
            _, cache = bridge.run_with_cache(
                self._ids(number), names_filter=self._hooks, stop_at_layer=self._last_layer + 1, return_type=None
            )
            for name in self._hooks:
                np.save(target / f"{name}.{number}.npy", cache[name].flatten(0, 1).float().cpu().numpy())

    def _ids(self, number: int) -> torch.Tensor:
        return torch.from_numpy(self._plan.batch(number).tokens.astype(np.int64)).to(self._model.device)

    @contextmanager
    def _truncated(self) -> Generator[nn.Module]:
        """Take the layers after the last hook point off the base model."""
        blocks = self._model.blocks
        rest = list(blocks)[self._last_layer + 1 :]
        del blocks[self._last_layer + 1 :]
        try:
            yield self._model.module.base_model
        finally:
            blocks.extend(rest)
