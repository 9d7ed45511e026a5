"""harvest: run the model over the prompts and store the activations at any hook points, shard by shard.

Rows, batches and shards are fixed by a plan before the weights load; a killed harvest goes on at the first shard
without a commit record and ends with the bytes of an uninterrupted one.
"""

import json
from dataclasses import asdict, dataclass
from functools import partial
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
from pydantic import Field

from mi_pipe.activations.harvest.batches import Batching, batch_tokens_for
from mi_pipe.activations.harvest.covariance_choice import CovarianceChoice, with_covariance
from mi_pipe.activations.harvest.fallback import Fallback
from mi_pipe.activations.harvest.filling import HarvestJob
from mi_pipe.activations.harvest.finishing import finish_store
from mi_pipe.activations.harvest.forward import BatchTooLargeError, ForwardPass
from mi_pipe.activations.harvest.hook_selection import array_layouts, at_lengths, check_shard_rows, select_hooks
from mi_pipe.activations.harvest.plan import HarvestPlan
from mi_pipe.activations.harvest.positions import at_positions, kept_tokens
from mi_pipe.activations.harvest.precision import Precision, PrecisionChoice, pick_precision, round_weights
from mi_pipe.activations.harvest.precision_sample import measure_precision
from mi_pipe.activations.harvest.writer import StorageOverflowError
from mi_pipe.activations.layout import StoreLayout, shard_rows_for
from mi_pipe.activations.row_table import TOKENS_FILE, row_table
from mi_pipe.activations.storage_dtype import StoreDType, numpy_dtype
from mi_pipe.activations.store import PRECISION_FILE, PROMPTS_FILE
from mi_pipe.activations.tokens import Tokens
from mi_pipe.core.atomic import write_bytes
from mi_pipe.core.config import Config, Execution
from mi_pipe.core.errors import PromptError
from mi_pipe.core.manifest import Scalar
from mi_pipe.core.place import Place, open_place
from mi_pipe.core.pool import contiguous_shares
from mi_pipe.core.stage import Estimate, Stage
from mi_pipe.core.workspace import Workspace
from mi_pipe.models.device import pick_device
from mi_pipe.models.info import ModelInfo
from mi_pipe.models.model import Model
from mi_pipe.models.source import ModelSource, load_source, source_hooks, source_vocabulary
from mi_pipe.prompts.prompt_set import PromptSet

_SAMPLE_PROMPTS = 8
_TABLE_BYTES_A_ROW = 24
_RUNS_A_WORKER = 4
"""Units of work a worker, so that a slow or lost one holds up little."""


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
    positions: str = Field(default="all", min_length=1)
    """Which tokens become rows: all, last (of each prompt), every 8 (the first, the ninth, ...), or a condition such as
    `token == ' Paris' or pos == pos_end` on the columns of the prompt set's tables."""
    massive_factor: float = Field(default=10.0, gt=1)
    """A row is massive if its norm is above this many median norms; statistics and training leave it out."""
    covariance: CovarianceChoice = "auto"
    """Which hook points' covariances are kept with the statistics: always (all), never, or auto: those up to 1,024 wide
    where all together cost at most 1 % of the forward pass."""
    batch_tokens: int | None = Field(default=None, ge=1)
    """Tokens of one forward pass; part of the result, because what is in a batch changes the last bits. By default
    1,024 on a CPU, whose caches they fit, and 16,384 on a GPU; every batch is halved where that is too much."""
    shard_rows: int | None = Field(default=None, ge=1)
    """Rows of a shard, a power of two; by default at most 134 MB, and less for small stores."""
    device: Annotated[str, Execution()] = "auto"
    """Device of the model: auto, cuda, mps or cpu."""
    destination: Annotated[str | None, Execution()] = None
    """URL of an object store to write to (`s3://bucket/prefix`); by default the store's own folder."""


def estimate(config: HarvestConfig, inputs: Inputs) -> Estimate:
    """Return the bytes of shards and tables; raises what `run` would raise before the model loads."""
    plan = make_plan(config, inputs, Fallback(config.store_dtype))
    layout = plan.layout
    size = layout.size_bytes + layout.n_rows * _TABLE_BYTES_A_ROW
    names = ", ".join(array.name for array in layout.arrays)
    return Estimate(size, layout.n_shards, "shards", (f"{layout.n_rows:,} rows of {names}",))


def run(config: HarvestConfig, inputs: Inputs, work: Workspace) -> dict[str, Scalar]:
    """Fill the store; return its main figures."""
    fallback = Fallback.read(work.scratch, config.store_dtype)
    while True:
        job = make_job(config, inputs, work.place_at(config.destination), work.scratch_at(config.destination), fallback)
        try:
            return _harvest(config, inputs, work, job, fallback)
        except StorageOverflowError as error:
            if config.on_overflow == "refuse" or fallback.store_dtype != "float16":
                raise
            fallback = fallback.with_bfloat16(error)
        except BatchTooLargeError as error:
            fallback = fallback.with_halved_batches(job.plan, error)
        fallback.write(work.scratch)


def _harvest(
    config: HarvestConfig, inputs: Inputs, work: Workspace, job: HarvestJob, fallback: Fallback
) -> dict[str, Scalar]:
    store_dtype = fallback.store_dtype
    n_shards = job.plan.layout.n_shards
    if job.prepare(work.scratch / "group", store_attributes(config, inputs, fallback)):
        work.path(PRECISION_FILE).unlink(missing_ok=True)
    todo = _mark_done(job, work)
    work.ledger.expect(n_shards)
    if todo or not work.path(PRECISION_FILE).exists():
        model = load_source(inputs.model, config.device, "float32")
        measure_precision_into(config, job.plan, model, work, store_dtype)
        if work.pool is None or work.pool.n_workers < 2:  # noqa: PLR2004
            _fill(job, ForwardPass(model, job.hooks, precision_of(config), store_dtype), work, todo)
        else:
            del model
            _fill_in_pool(Share(config, inputs, job.place.url, job.scratch.url, fallback), job, work, todo)
    return finish(job, config, inputs, work, fallback)


def make_job(config: HarvestConfig, inputs: Inputs, place: Place, scratch: Place, fallback: Fallback) -> HarvestJob:
    """Return the plan with the places of its shards and of their sums."""
    return HarvestJob(make_plan(config, inputs, fallback), place, scratch)


def make_plan(config: HarvestConfig, inputs: Inputs, fallback: Fallback) -> HarvestPlan:
    """Return the plan; raises HookPointError, ConfigError or PromptError for what cannot be done."""
    check_shard_rows(config.shard_rows)
    hooks, info = source_hooks(inputs.model)
    sites = select_hooks(config.hooks, hooks)
    prompts = inputs.prompts
    ids, offsets = np.asarray(prompts.token_ids), np.asarray(prompts.offsets, np.int64)
    kept = kept_tokens(ids, offsets, source_vocabulary(inputs.model).bos_id, config.keep_bos)
    kept = at_positions(config.positions, kept, offsets, prompts.file(TOKENS_FILE), prompts.file(PROMPTS_FILE))
    tokens = Tokens(ids, offsets, kept)
    _check_tokens(tokens, info.n_ctx, info.d_vocab, prompts.id)
    sites = at_lengths(sites, tokens.lengths)
    widest = max(site.width for site in sites) * numpy_dtype(fallback.store_dtype).itemsize
    shard_rows = config.shard_rows or shard_rows_for(tokens.n_rows, widest, len(tokens.ids))
    arrays = array_layouts(sites, info, fallback.store_dtype, shard_rows)
    layout = StoreLayout(tokens.n_rows, shard_rows, arrays, with_covariance(config.covariance, sites, info))
    identity = {"model": inputs.model.digest, "precision": precision_of(config)}
    return HarvestPlan(tokens, layout, _batching(config, info, fallback), identity)


def _batching(config: HarvestConfig, info: ModelInfo, fallback: Fallback) -> Batching:
    batch_tokens = config.batch_tokens or batch_tokens_for(pick_device(config.device))
    return Batching(batch_tokens, may_pad=info.is_causal, halvings=fallback.halvings)


def _check_tokens(tokens: Tokens, n_ctx: int, d_vocab: int, prompts: str) -> None:
    if tokens.n_rows == 0:
        raise PromptError(f"{prompts} has no token to store. Use other prompts or positions, or keep_bos: true.")
    longest = int(tokens.lengths.max())
    if longest > n_ctx:
        raise PromptError(f"{prompts} has a prompt of {longest:,} tokens; the model takes at most {n_ctx:,}.")
    largest = int(tokens.ids.max())
    if largest >= d_vocab:
        raise PromptError(
            f"{prompts} has token {largest:,}, the model's vocabulary ends at {d_vocab - 1:,}. "
            "Make the prompts with this model's tokenizer."
        )


def precision_of(config: HarvestConfig) -> Precision:
    """Return what the model computes in on this device."""
    return pick_precision(config.precision, pick_device(config.device))


def store_attributes(config: HarvestConfig, inputs: Inputs, fallback: Fallback) -> dict[str, Any]:
    """Return what the store says of itself: also what auto has meant here, so that its shards can be made again."""
    return {
        "model": inputs.model.id,
        "prompts": inputs.prompts.id,
        "precision": precision_of(config),
        "batch_tokens": config.batch_tokens or batch_tokens_for(pick_device(config.device)),
        "store_dtype": fallback.store_dtype,
        "halvings": fallback.halvings,
    }


def _mark_done(job: HarvestJob, work: Workspace) -> list[int]:
    """Let the ledger follow the commit records; return the shards that are to be done."""
    done = job.commits()
    for shard in done:
        if _unit(shard) not in work.ledger:
            work.ledger.mark(_unit(shard))
    return [shard for shard in range(job.plan.layout.n_shards) if shard not in done]


def _unit(shard: int) -> str:
    return f"shard {shard}"


def measure_precision_into(
    config: HarvestConfig, plan: HarvestPlan, model: Model, work: Workspace, store_dtype: StoreDType
) -> None:
    """Round the weights to the harvest's precision, and write what that costs unless it is known."""
    precision = precision_of(config)
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


def _fill(job: HarvestJob, forward: ForwardPass, work: Workspace, todo: list[int]) -> None:
    n_rows = job.plan.layout.n_rows

    def on_commit(shard: int) -> None:
        work.ledger.mark(_unit(shard))

    def on_rows(n_done: int) -> None:
        work.progress.update(n_done, n_rows, "rows")

    job.fill(forward, todo, on_commit, on_rows)


@dataclass(frozen=True)
class Share:
    """What a worker has to know to fill shards of a harvest."""

    config: HarvestConfig
    inputs: Inputs
    place: str
    scratch: str
    fallback: Fallback


def fill_share(share: Share, shards: list[int]) -> list[int]:
    """Fill some shards in a worker process and return their numbers; plan and model are kept for the next ones."""
    key = share.place, share.fallback
    if key not in _KEPT:
        job = make_job(share.config, share.inputs, open_place(share.place), open_place(share.scratch), share.fallback)
        precision = precision_of(share.config)
        model = load_source(share.inputs.model, share.config.device, "float32")
        round_weights(model.module, precision)
        _KEPT.clear()
        _KEPT[key] = job, ForwardPass(model, job.hooks, precision, share.fallback.store_dtype)
    job, forward = _KEPT[key]
    job.fill(forward, shards)
    return shards


_KEPT: dict[tuple[str, Fallback], tuple[HarvestJob, ForwardPass]] = {}


def _fill_in_pool(share: Share, job: HarvestJob, work: Workspace, todo: list[int]) -> None:
    """Let the pool's workers fill the shards, in runs of neighbours since batches straddle their edges."""
    assert work.pool is not None, "called for a pool"
    layout = job.plan.layout
    n_rows = layout.n_rows - sum(layout.shard_n_rows(shard) for shard in todo)
    runs = contiguous_shares(todo, _RUNS_A_WORKER * work.pool.n_workers)
    for shards in work.pool.run(partial(fill_share, share), runs):
        for shard in shards:
            work.ledger.mark(_unit(shard))
            n_rows += layout.shard_n_rows(shard)
        work.progress.update(n_rows, layout.n_rows, "rows")


def finish(
    job: HarvestJob, config: HarvestConfig, inputs: Inputs, work: Workspace, fallback: Fallback
) -> dict[str, Scalar]:
    """Write statistics and tables, and return the main figures."""
    plan, commits = job.plan, job.commits()
    assert len(commits) == plan.layout.n_shards, "every shard is written and committed by now"
    texts = pd.Series(inputs.prompts.read_table(TOKENS_FILE, ["text"])["text"])
    figures = finish_store(
        work,
        job.place,
        job.scratch,
        plan.layout,
        commits.values(),
        config.massive_factor,
        lambda massive: row_table(plan.tokens, texts, massive),
    )
    write_bytes(work.path(PROMPTS_FILE), inputs.prompts.file(PROMPTS_FILE).read_bytes())
    errors = json.loads(work.path(PRECISION_FILE).read_bytes())
    return {
        **figures,
        "n_prompts": plan.tokens.n_prompts,
        "precision": errors["precision"],
        "store_dtype": errors["store_dtype"],
        "halvings": fallback.halvings,
        "overflow": fallback.overflow,
        "fvu_added": max(error["fvu_added"] for error in errors["hooks"].values()),
    }


STAGE = Stage(name="harvest", version=1, config=HarvestConfig, inputs=Inputs, run=run, estimate=estimate)
