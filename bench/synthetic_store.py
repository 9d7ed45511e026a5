"""Activation stores of made-up values, written by the harvest's own writer; every row tells its number.

Values are standard normal but for the first two of a row, which are row % 1024 and row // 1024 (exact in float16 for
up to two million rows), so that a reader's batches can be checked and their rows traced to prompts.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
from jaxtyping import Int, Shaped

from mi_pipe.activations.harvest.batches import Batching
from mi_pipe.activations.harvest.filling import HarvestJob
from mi_pipe.activations.harvest.finishing import finish_store
from mi_pipe.activations.harvest.plan import HarvestPlan
from mi_pipe.activations.harvest.writer import ShardWriter
from mi_pipe.activations.layout import ArrayLayout, StoreLayout, chunk_rows_for, shard_rows_for
from mi_pipe.activations.row_table import row_table
from mi_pipe.activations.storage_dtype import numpy_dtype
from mi_pipe.activations.store import PROMPTS_FILE, ActivationStore
from mi_pipe.activations.tokens import Tokens
from mi_pipe.core.config import Config
from mi_pipe.core.manifest import Scalar
from mi_pipe.core.stage import Estimate, Stage, execute
from mi_pipe.core.store import Store
from mi_pipe.core.workspace import Workspace

HOOK = "blocks.5.hook_resid_post"
_RADIX = 1024
_N_BASE_ROWS = 1 << 13


class SyntheticConfig(Config):
    """The size of a store."""

    n_prompts: int
    n_ctx: int
    width: int
    store_dtype: Literal["float16", "float32"] = "float16"


@dataclass(frozen=True)
class NoInputs:
    """Nothing is read."""


def _fill(job: HarvestJob, config: SyntheticConfig) -> None:
    """Write every shard."""
    layout = job.plan.layout
    base = np.random.default_rng(0).standard_normal((_N_BASE_ROWS, config.width), np.float32)
    base = base.astype(numpy_dtype(config.store_dtype))
    with ShardWriter(job.place, job.scratch, layout, job.plan.hash, lambda _: None) as writer:
        for shard in range(layout.n_shards):
            buffers = writer.buffers()
            start, stop = layout.bounds(shard)
            for first in range(start, stop, _N_BASE_ROWS):
                rows = np.arange(first, min(stop, first + _N_BASE_ROWS))
                values = base[: len(rows)].copy()
                values[:, 0], values[:, 1] = rows % _RADIX, rows // _RADIX
                buffers[HOOK].put(rows - start, values)
            writer.submit(shard, buffers)


def row_numbers(values: Shaped[np.ndarray, "row width"]) -> Int[np.ndarray, " row"]:
    """Return the rows of the store that some values are."""
    return values[:, 0].astype(np.int64) + _RADIX * values[:, 1].astype(np.int64)


def _run(config: SyntheticConfig, _: NoInputs, work: Workspace) -> dict[str, Scalar]:
    job = HarvestJob(_plan(config), work.place_at(None), work.scratch_at(None))
    attributes = {"model": "none", "prompts": "none", "store_dtype": config.store_dtype}
    job.prepare(work.scratch / "group", attributes)
    _fill(job, config)
    tokens = job.plan.tokens
    texts = pd.Series("a", index=range(len(tokens.ids)))
    work.write_table(PROMPTS_FILE, pd.DataFrame({"prompt_idx": np.arange(config.n_prompts, dtype=np.int32)}))
    commits = job.commits().values()
    return finish_store(
        work, job.place, job.scratch, job.plan.layout, commits, 10.0, lambda massive: row_table(tokens, texts, massive)
    )


def _plan(config: SyntheticConfig) -> HarvestPlan:
    n_rows = config.n_prompts * config.n_ctx
    tokens = Tokens(np.zeros(n_rows, np.int32), np.arange(config.n_prompts + 1) * config.n_ctx, np.ones(n_rows, bool))
    row_bytes = config.width * numpy_dtype(config.store_dtype).itemsize
    shard_rows = shard_rows_for(n_rows, row_bytes)
    array = ArrayLayout(
        HOOK, (config.width,), "d_model", config.store_dtype, chunk_rows_for(row_bytes, shard_rows), shard_rows
    )
    return HarvestPlan(tokens, StoreLayout(n_rows, shard_rows, (array,)), Batching(4096), {})


def _estimate(config: SyntheticConfig, _: NoInputs) -> Estimate:
    layout = _plan(config).layout
    return Estimate(layout.size_bytes, layout.n_shards, "shards")


STAGE = Stage("harvest", 1, SyntheticConfig, NoInputs, _run, _estimate)


@contextmanager
def synthetic_store(config: SyntheticConfig, folder: Path | None = None) -> Iterator[ActivationStore]:
    """Make a store in a new folder below `folder` (the temporary one by default), and remove it afterwards."""
    with tempfile.TemporaryDirectory(dir=folder, prefix="mi-pipe-bench-") as root:
        yield ActivationStore(execute(STAGE, config, NoInputs(), Store(root)).artifact.path)
