"""harvest: run the model over the prompts and store the activations at any hook points, shard by shard.

Rows, batches and shards are fixed by a plan before the weights load; a killed harvest goes on at the first shard
without a commit record and ends with the bytes of an uninterrupted one.
"""

import json
import shutil
from collections.abc import Container
from dataclasses import asdict, dataclass
from functools import partial
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
from pydantic import Field

from mi_pipe.activations.commits import COMMITS_FOLDER, Commit, committed
from mi_pipe.activations.forward import ForwardPass
from mi_pipe.activations.group import GROUP_NAME, create_group, plan_of_group
from mi_pipe.activations.harvester import harvest_shards
from mi_pipe.activations.hook_selection import array_layouts, check_shard_rows, select_hooks
from mi_pipe.activations.layout import StoreLayout, shard_rows_for
from mi_pipe.activations.plan import HarvestPlan, Tokens, kept_tokens
from mi_pipe.activations.precision import Precision, PrecisionChoice, pick_precision, round_weights
from mi_pipe.activations.precision_sample import measure_precision
from mi_pipe.activations.row_table import TOKENS_FILE, row_table
from mi_pipe.activations.storage_dtype import StoreDType, numpy_dtype
from mi_pipe.activations.store import PRECISION_FILE, PROMPTS_FILE, STATISTICS_FILE
from mi_pipe.activations.sums_file import SUMS_FOLDER, read_sums
from mi_pipe.activations.totals import totals
from mi_pipe.activations.writer import ShardWriter, StorageOverflowError
from mi_pipe.core.atomic import write_bytes
from mi_pipe.core.config import Config, Execution
from mi_pipe.core.errors import PromptError
from mi_pipe.core.manifest import Scalar
from mi_pipe.core.stage import Estimate, Stage
from mi_pipe.core.workspace import Workspace
from mi_pipe.models.device import pick_device
from mi_pipe.models.model import Model
from mi_pipe.models.source import ModelSource, load_source, source_hooks, source_vocabulary
from mi_pipe.prompts.prompt_set import PromptSet

_SAMPLE_PROMPTS = 8
_TABLE_BYTES_A_ROW = 24
_OVERFLOWED = "overflowed"


@dataclass(frozen=True)
class Inputs:
    """What a harvest reads."""

    model: ModelSource
    prompts: PromptSet


class HarvestConfig(Config):
    """Which activations to store, and how exactly."""

    hooks: list[str] = Field(min_length=1)
    """Hook points by TransformerLens' names; several at once by `blocks.{3,7}.hook_resid_post` or `blocks.*.…`."""
    precision: PrecisionChoice = "auto"
    """What the model computes in: mixed (bfloat16 products, float32 residual stream), bfloat16, float32, or auto:
    mixed where the device has bfloat16 products, else float32."""
    store_dtype: StoreDType = "float16"
    """What is stored: float16, bfloat16 (as uint16 bits) or float32."""
    on_overflow: Literal["refuse", "bfloat16"] = "refuse"
    """If a value does not fit float16: stop with a clear error, or begin again storing bfloat16."""
    keep_bos: bool = False
    """Keep the row of the BOS token at the start of each prompt."""
    massive_factor: float = Field(default=10.0, gt=1)
    """A row is massive if its norm is above this many median norms; statistics and training leave it out."""
    batch_tokens: int = Field(default=4096, ge=1)
    """Tokens of one forward pass; part of the result, because what is in a batch changes the last bits."""
    shard_rows: int | None = Field(default=None, ge=1)
    """Rows of a shard, a power of two; by default at most 134 MB, and less for small stores."""
    device: Annotated[str, Execution()] = "auto"
    """Device of the model: auto, cuda, mps or cpu."""


def estimate(config: HarvestConfig, inputs: Inputs) -> Estimate:
    """Return the bytes of shards and tables; raises what `run` would raise before the model loads."""
    plan = make_plan(config, inputs, config.store_dtype)
    layout = plan.layout
    size = layout.size_bytes + layout.n_rows * _TABLE_BYTES_A_ROW
    names = ", ".join(array.name for array in layout.arrays)
    return Estimate(size, layout.n_shards, "shards", (f"{layout.n_rows:,} rows of {names}",))


def run(config: HarvestConfig, inputs: Inputs, work: Workspace) -> dict[str, Scalar]:
    """Fill the store; return its main figures."""
    overflowed = work.scratch / _OVERFLOWED
    if overflowed.exists():
        return _harvest(config, inputs, work, "bfloat16")
    try:
        return _harvest(config, inputs, work, config.store_dtype)
    except StorageOverflowError:
        if config.on_overflow == "refuse" or config.store_dtype != "float16":
            raise
        write_bytes(overflowed, b"")
        return _harvest(config, inputs, work, "bfloat16")


def _harvest(config: HarvestConfig, inputs: Inputs, work: Workspace, store_dtype: StoreDType) -> dict[str, Scalar]:
    plan = make_plan(config, inputs, store_dtype)
    _prepare_folder(plan, inputs, work, store_dtype)
    done = _done_shards(plan, work)
    work.ledger.expect(plan.layout.n_shards)
    if len(done) < plan.layout.n_shards or not work.path(PRECISION_FILE).exists():
        model = load_source(inputs.model, config.device, "float32")
        _measure_precision(config, plan, model, work, store_dtype)
        _fill_shards(plan, ForwardPass(model, _names(plan), _precision(config), store_dtype), work, done)
    return _finish(plan, config, inputs, work)


def make_plan(config: HarvestConfig, inputs: Inputs, store_dtype: StoreDType) -> HarvestPlan:
    """Return the plan; raises HookPointError, ConfigError or PromptError for what cannot be done."""
    check_shard_rows(config.shard_rows)
    hooks, info = source_hooks(inputs.model)
    sites = select_hooks(config.hooks, hooks)
    prompts = inputs.prompts
    ids, offsets = np.asarray(prompts.token_ids), np.asarray(prompts.offsets, np.int64)
    kept = kept_tokens(ids, offsets, source_vocabulary(inputs.model).bos_id, config.keep_bos)
    tokens = Tokens(ids, offsets, kept)
    _check_tokens(tokens, info.n_ctx, info.d_vocab, prompts.id)
    widest = max(site.width for site in sites) * numpy_dtype(store_dtype).itemsize
    shard_rows = config.shard_rows or shard_rows_for(tokens.n_rows, widest)
    layout = StoreLayout(tokens.n_rows, shard_rows, array_layouts(sites, info, store_dtype, shard_rows))
    identity = {"model": inputs.model.digest, "precision": _precision(config)}
    return HarvestPlan(tokens, layout, config.batch_tokens, identity)


def _check_tokens(tokens: Tokens, n_ctx: int, d_vocab: int, prompts: str) -> None:
    if tokens.n_rows == 0:
        raise PromptError(f"{prompts} has no token to store. Use other prompts, or keep_bos: true.")
    longest = int(tokens.lengths.max())
    if longest > n_ctx:
        raise PromptError(f"{prompts} has a prompt of {longest:,} tokens; the model takes at most {n_ctx:,}.")
    largest = int(tokens.ids.max())
    if largest >= d_vocab:
        raise PromptError(
            f"{prompts} has token {largest:,}, the model's vocabulary ends at {d_vocab - 1:,}. "
            "Make the prompts with this model's tokenizer."
        )


def _precision(config: HarvestConfig) -> Precision:
    return pick_precision(config.precision, pick_device(config.device))


def _names(plan: HarvestPlan) -> list[str]:
    return [array.name for array in plan.layout.arrays]


def _prepare_folder(plan: HarvestPlan, inputs: Inputs, work: Workspace, store_dtype: StoreDType) -> None:
    """Make the group unless it is there; what another plan left (other store dtype, older version) goes first."""
    group = work.folder / GROUP_NAME
    if group.exists() and plan_of_group(group) != plan.hash:
        work.path(PRECISION_FILE).unlink(missing_ok=True)
        for folder in (work.folder / COMMITS_FOLDER, work.scratch / SUMS_FOLDER, group):
            shutil.rmtree(folder, ignore_errors=True)
    if group.exists():
        return
    attributes: dict[str, Any] = {
        "plan_hash": plan.hash,
        "model": inputs.model.id,
        "prompts": inputs.prompts.id,
        "hooks": _names(plan),
        "store_dtype": store_dtype,
        "n_tokens": plan.layout.n_rows,
        "n_prompts": plan.tokens.n_prompts,
        "shard_rows": plan.layout.shard_rows,
    }
    tokens = plan.tokens
    create_group(group, work.scratch / "group", plan.layout, tokens.row_arrays(), tokens.row_offsets, attributes)


def _done_shards(plan: HarvestPlan, work: Workspace) -> dict[int, Commit]:
    """Return the records of finished shards; the ledger follows them."""
    done: dict[int, Commit] = {}
    for shard in range(plan.layout.n_shards):
        commit = committed(work.folder, work.folder / GROUP_NAME, plan.layout, plan.hash, shard)
        if commit is not None and read_sums(work.scratch, shard) is not None:
            done[shard] = commit
            if _unit(shard) not in work.ledger:
                work.ledger.mark(_unit(shard))
    return done


def _unit(shard: int) -> str:
    return f"shard {shard}"


def _measure_precision(
    config: HarvestConfig, plan: HarvestPlan, model: Model, work: Workspace, store_dtype: StoreDType
) -> None:
    """Round the weights to the harvest's precision, and write what that costs unless it is known."""
    precision = _precision(config)
    rounding = partial(round_weights, model.module, precision)
    if work.path(PRECISION_FILE).exists():
        rounding()
        return
    work.progress.update(0, plan.layout.n_rows, "rows", "measuring precision")
    errors = measure_precision(plan, model, precision, store_dtype, config.massive_factor, _SAMPLE_PROMPTS, rounding)
    hooks = {name: asdict(error) for name, error in errors.items()}
    work.write_json(
        PRECISION_FILE,
        {"precision": precision, "store_dtype": store_dtype, "reference": "float32", "hooks": hooks},
    )


def _fill_shards(plan: HarvestPlan, forward: ForwardPass, work: Workspace, done: Container[int]) -> None:
    layout, group = plan.layout, work.folder / GROUP_NAME

    def on_commit(shard: int) -> None:
        work.ledger.mark(_unit(shard))

    def on_rows(n_rows: int) -> None:
        work.progress.update(n_rows, layout.n_rows, "rows")

    with ShardWriter(work.folder, group, work.scratch, layout, plan.hash, on_commit) as writer:
        harvest_shards(plan, forward, writer, done, on_rows)


def _finish(plan: HarvestPlan, config: HarvestConfig, inputs: Inputs, work: Workspace) -> dict[str, Scalar]:
    """Write statistics and tables, hand over the shards' checksums, and return the main figures."""
    for shard in range(plan.layout.n_shards):
        commit = committed(work.folder, work.folder / GROUP_NAME, plan.layout, plan.hash, shard)
        assert commit is not None, "every shard is written and committed by now"
        for key, (_, checksum) in commit.files.items():
            work.checksum(f"{GROUP_NAME}/{key}", f"crc32c:{checksum}")
    found = totals(work.folder / GROUP_NAME, work.scratch, plan.layout, config.massive_factor)
    tensors = {key: value for name, item in found.items() for key, value in item.statistics.to_tensors(name).items()}
    work.write_tensors(STATISTICS_FILE, tensors)
    texts = pd.Series(inputs.prompts.token_table()["text"])
    work.write_table(TOKENS_FILE, row_table(plan.tokens, texts, {name: item.massive for name, item in found.items()}))
    write_bytes(work.path(PROMPTS_FILE), inputs.prompts.file(PROMPTS_FILE).read_bytes())
    errors = json.loads(work.path(PRECISION_FILE).read_bytes())
    return {
        "n_rows": plan.layout.n_rows,
        "n_prompts": plan.tokens.n_prompts,
        "n_hooks": len(found),
        "n_shards": plan.layout.n_shards,
        "precision": errors["precision"],
        "store_dtype": errors["store_dtype"],
        "n_massive": max(item.statistics.n_massive for item in found.values()),
        "fvu_added": max(error["fvu_added"] for error in errors["hooks"].values()),
    }


STAGE = Stage(name="harvest", version=1, config=HarvestConfig, inputs=Inputs, run=run, estimate=estimate)
