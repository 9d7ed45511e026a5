"""harvest: run the model over the prompts and store the activations at any hook points, shard by shard.

Rows, batches and shards are fixed by a plan before the weights load; a killed harvest goes on at the first shard
without a commit record and ends with the bytes of an uninterrupted one.
"""

import json
from dataclasses import asdict, dataclass
from functools import partial

import pandas as pd

from mi_pipe.activations.harvest.fallback import Fallback
from mi_pipe.activations.harvest.filling import HarvestJob
from mi_pipe.activations.harvest.finishing import finish_store
from mi_pipe.activations.harvest.forward import BatchTooLargeError, ForwardPass, load_pass
from mi_pipe.activations.harvest.precision import round_weights
from mi_pipe.activations.harvest.precision_sample import measure_precision
from mi_pipe.activations.harvest.writer import StorageOverflowError
from mi_pipe.activations.row_table import TOKENS_FILE, row_table
from mi_pipe.activations.store import PRECISION_FILE, PROMPTS_FILE
from mi_pipe.core.atomic import write_bytes
from mi_pipe.core.manifest import Scalar
from mi_pipe.core.place import open_place
from mi_pipe.core.pool import contiguous_shares
from mi_pipe.core.stage import Estimate, Stage
from mi_pipe.core.workspace import Workspace
from mi_pipe.models.source import load_source
from stages.harvest_plan import HarvestConfig, Inputs, make_job, make_plan, precision_of, store_attributes

_SAMPLE_PROMPTS = 8
_TABLE_BYTES_A_ROW = 24
_RUNS_A_WORKER = 4
"""Units of work a worker, so that a slow or lost one holds up little."""


def estimate(config: HarvestConfig, inputs: Inputs) -> Estimate:
    """Return the bytes of shards and tables; raises what `run` would raise before the model loads."""
    plan = make_plan(config, inputs, Fallback(config.store_dtype))
    layout = plan.layout
    size = layout.size_bytes + layout.n_rows * _TABLE_BYTES_A_ROW
    return Estimate(size, layout.n_shards, "shards")


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
    n_shards = job.plan.layout.n_shards
    if job.prepare(work.scratch / "group", store_attributes(config, inputs, fallback)):
        work.path(PRECISION_FILE).unlink(missing_ok=True)
    todo = _mark_done(job, work)
    work.ledger.expect(n_shards)
    if todo or not work.path(PRECISION_FILE).exists():
        forward = measured_pass(config, inputs, job, work, fallback)
        if work.pool is None or work.pool.n_workers < 2:  # noqa: PLR2004
            _fill(job, forward, work, todo)
        else:
            del forward
            _fill_in_pool(Share(config, inputs, job.place.url, job.scratch.url, fallback), job, work, todo)
    return finish(job, config, inputs, work, fallback)


def _mark_done(job: HarvestJob, work: Workspace) -> list[int]:
    """Let the ledger follow the commit records; return the shards that are to be done."""
    done = job.commits()
    for shard in done:
        if _unit(shard) not in work.ledger:
            work.ledger.mark(_unit(shard))
    return [shard for shard in range(job.plan.layout.n_shards) if shard not in done]


def _unit(shard: int) -> str:
    return f"shard {shard}"


def measured_pass(
    config: HarvestConfig, inputs: Inputs, job: HarvestJob, work: Workspace, fallback: Fallback
) -> ForwardPass:
    """Load the model, write what the harvest's precision costs unless that is known, and return the forward pass."""
    precision, store_dtype = precision_of(config), fallback.store_dtype
    if work.path(PRECISION_FILE).exists():
        return load_pass(inputs.model, job.hooks, precision, store_dtype, config.device)
    work.progress.update(0, job.plan.layout.n_rows, "rows", "measuring precision")
    model = load_source(inputs.model, config.device, "float32")
    rounding = partial(round_weights, model.module, precision)
    errors = measure_precision(
        job.plan, model, precision, store_dtype, config.massive_factor, _SAMPLE_PROMPTS, rounding
    )
    hooks = {name: asdict(error) for name, error in errors.items()}
    known = {"precision": precision, "store_dtype": store_dtype, "reference": "float32", "hooks": hooks}
    work.write_json(PRECISION_FILE, known)
    return ForwardPass(model, job.hooks, precision, store_dtype)


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
        _KEPT.clear()
        how = precision_of(share.config), share.fallback.store_dtype
        _KEPT[key] = job, load_pass(share.inputs.model, job.hooks, *how, share.config.device)
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
