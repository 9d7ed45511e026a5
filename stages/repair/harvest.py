"""Makes the damaged files of a harvest again: shards by the batches that have rows in them, the rest from the inputs.

A shard is a function of plan and number alone, so one that is computed again has the bytes that were published, on a
machine like the one that made it. What "auto" meant then stands in the group's attributes.
"""

import contextlib
import json
from typing import Any

from mi_pipe.activations.commits import Commit, commit_name, read_commit, write_commit
from mi_pipe.activations.group import GROUP_NAME
from mi_pipe.activations.harvest.fallback import Fallback
from mi_pipe.activations.harvest.filling import HarvestJob
from mi_pipe.activations.harvest.plan import HarvestPlan
from mi_pipe.activations.row_table import TOKENS_FILE
from mi_pipe.activations.store import PRECISION_FILE, PROMPTS_FILE, STATISTICS_FILE
from mi_pipe.core.artifact import Artifact
from mi_pipe.core.atomic import write_bytes
from mi_pipe.core.errors import ArtifactDamagedError, StageError
from mi_pipe.core.mending import Mender
from mi_pipe.core.place import LocalPlace
from mi_pipe.core.workspace import Workspace
from stages.harvest import finish, measured_pass
from stages.harvest_plan import HarvestConfig, Inputs, make_job, store_attributes

_TABLES = (STATISTICS_FILE, TOKENS_FILE, PROMPTS_FILE)


def mend_harvest(
    artifact: Artifact, config: HarvestConfig, inputs: Inputs, damaged: list[str], work: Workspace, mender: Mender
) -> None:
    """Make the `damaged` files of a harvest again in `work` and install them; raises StageError if bytes differ."""
    config, fallback = _as_it_was(artifact, config)
    job = make_job(config, inputs, LocalPlace(work.folder), LocalPlace(work.scratch), fallback)
    _check_plan(artifact, job.plan)
    job.prepare(work.scratch / "group", store_attributes(config, inputs, fallback))
    shards = [shard for shard in range(job.plan.layout.n_shards) if _keys(job, shard) & set(damaged)]
    if shards or PRECISION_FILE in damaged:
        _run_model(artifact, config, inputs, damaged, work, job, shards, fallback)
    for shard in range(job.plan.layout.n_shards):
        if commit_name(shard) in damaged:
            _write_record(artifact, job, shard)
    mender.install(name for name in damaged if name not in _TABLES)
    if set(damaged) & set(_TABLES):
        write_bytes(work.path(PRECISION_FILE), artifact.place.read(PRECISION_FILE))
        finish(HarvestJob(job.plan, artifact.place, job.scratch), config, inputs, work, fallback)
        mender.install(name for name in damaged if name in _TABLES)


def _as_it_was(artifact: Artifact, config: HarvestConfig) -> tuple[HarvestConfig, Fallback]:
    """Return the config with what auto meant when the harvest was made, and what it had fallen back to."""
    known: dict[str, Any] = dict(artifact.summary)
    known |= _group_attributes(artifact)
    chosen = {name: known[name] for name in ("precision", "batch_tokens") if name in known}
    return config.model_copy(update=chosen), Fallback(known["store_dtype"], known.get("halvings", 0))


def _group_attributes(artifact: Artifact) -> dict[str, Any]:
    """Return what the group says of itself, or nothing if that is damaged."""
    name = f"{GROUP_NAME}/zarr.json"
    with contextlib.suppress(ArtifactDamagedError):
        artifact.check_file(name)
        return json.loads(artifact.place.read(name))["attributes"]
    return {}


def _check_plan(artifact: Artifact, plan: HarvestPlan) -> None:
    """Raise StageError if the plan is neither the one that the group names nor one that a commit record does."""
    records = (read_commit(artifact.place, shard) for shard in range(plan.layout.n_shards))
    recorded = (record.plan for record in records if record is not None)
    if plan.hash != _group_attributes(artifact).get("plan_hash") and plan.hash not in recorded:
        raise StageError(
            f"{artifact.id} cannot be mended: its manifest and inputs give another plan than the one it was made by, "
            f"as under another version of mi_pipe. Remove it with `mi-pipe rm {artifact.id}` and run its recipe again."
        )


def _keys(job: HarvestJob, shard: int) -> set[str]:
    return {f"{GROUP_NAME}/{array.key(shard)}" for array in job.plan.layout.arrays}


def _run_model(
    artifact: Artifact,
    config: HarvestConfig,
    inputs: Inputs,
    damaged: list[str],
    work: Workspace,
    job: HarvestJob,
    shards: list[int],
    fallback: Fallback,
) -> None:
    """Compute damaged shards, and the measured precision if that is damaged, unless an earlier repair has."""
    if PRECISION_FILE not in damaged:
        write_bytes(work.path(PRECISION_FILE), artifact.place.read(PRECISION_FILE))
    forward = measured_pass(config, inputs, job, work, fallback)
    done = job.commits()
    todo = [shard for shard in shards if shard not in done]
    n_rows = job.plan.layout.n_rows
    job.fill(forward, todo, on_rows=lambda n_done: work.progress.update(n_done, n_rows, "rows", "computing again"))


def _write_record(artifact: Artifact, job: HarvestJob, shard: int) -> None:
    """Write a shard's commit record as the manifest has its files, unless it was computed again."""
    layout, files = job.plan.layout, artifact.manifest.files
    entries = {array.key(shard): files[f"{GROUP_NAME}/{array.key(shard)}"] for array in layout.arrays}
    recorded = {key: (entry.size_bytes, entry.checksum) for key, entry in entries.items()}
    if shard not in job.commits():
        write_commit(job.place, Commit(shard, layout.bounds(shard), job.plan.hash, recorded))
