"""The default recipe made small: every stage, in seconds."""

import os
import subprocess
import sys
from pathlib import Path

from mi_pipe.core.artifact import Artifact
from mi_pipe.core.store import Store

MINI = [
    "train_model.n_steps=60",
    "train_model.checkpoint_every=20",
    "prompts.n_prompts=256",
    "tasks.induction.n_pairs=4",
    "harvest.shard_rows=4096",
    "saes.n_tokens=40_000",
    "saes.d_sae=64",
    "saes.batch_rows=256",
    "saes.log_steps=20",
    "saes.checkpoint_s=0",
]


def command(store: Path, *words: str, prefect: bool = False) -> list[str]:
    """Return the command line of a mini run."""
    options = [] if prefect else ["--no-prefect"]
    return [sys.executable, "-m", "flows.cli", "run", "tiny", *MINI, *words, "--store", str(store), *options]


def environment(tmp_path: Path) -> dict[str, str]:
    """Return the environment of a run: a Prefect home of its own, one thread."""
    return {**os.environ, "PREFECT_HOME": str(tmp_path / "prefect"), "OMP_NUM_THREADS": "1"}


def run(store: Path, tmp_path: Path, *words: str, prefect: bool = False) -> subprocess.CompletedProcess[str]:
    """Run the mini recipe to its end."""
    line = command(store, *words, prefect=prefect)
    return subprocess.run(line, capture_output=True, text=True, env=environment(tmp_path), check=False, timeout=600)


def digests(store: Path) -> dict[str, str]:
    """Return id -> digest of every artifact but the report, which tells times."""
    where = Store(store)
    opened = [Artifact(where.folder(artifact_id)) for artifact_id in where.published_ids()]
    return {artifact.id: artifact.digest for artifact in opened if artifact.manifest.stage != "report"}
