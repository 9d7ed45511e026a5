"""A stage is run once, continued after a kill, refused to two writers, and never taken for done when it is not."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mi_pipe.core.canonical import file_sha256
from mi_pipe.core.config import Config, Execution
from mi_pipe.core.errors import ArtifactDamagedError, ArtifactIncompleteError, ArtifactLockedError, DiskSpaceError
from mi_pipe.core.lock import exclusive_lock
from mi_pipe.core.manifest import write_manifest
from mi_pipe.core.stage import Estimate, check_disk, execute, stage_id
from mi_pipe.opening import open_artifact
from tests.core.counting_stage import STAGE, CountingConfig, Inputs

WORKER = """
import sys
from mi_pipe.core.stage import execute
from mi_pipe.core.store import Store
from tests.core.counting_stage import STAGE, CountingConfig, Inputs
execute(STAGE, CountingConfig(n=12, pause_s=0.02), Inputs(), Store(sys.argv[1]))
"""


def tree(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): file_sha256(p) for p in sorted(folder.rglob("*.txt"))}


def test_second_run_is_cached_and_changes_nothing(store):
    first = execute(STAGE, CountingConfig(), Inputs(), store)
    manifest = (first.artifact.path / "manifest.json").read_bytes()
    second = execute(STAGE, CountingConfig(), Inputs(), store)
    assert (first.outcome, second.outcome) == ("Completed", "Cached")
    assert (second.artifact.path / "manifest.json").read_bytes() == manifest
    assert first.artifact.summary == {"n": 5, "total": 30}


def test_a_failed_run_is_resumed_from_its_ledger(store, monkeypatch):
    monkeypatch.setenv("COUNTING_STOPS_AT", "2")
    with pytest.raises(RuntimeError):
        execute(STAGE, CountingConfig(), Inputs(), store)
    name = stage_id(STAGE, CountingConfig(), {})
    assert not store.is_published(name)
    assert store.ledger(name).n_done == 3
    assert store.ledger(name).n_total == 5
    assert store.unfinished_ids() == [name]
    with pytest.raises(ArtifactIncompleteError, match="Run its recipe again"):
        open_artifact(name, store)
    monkeypatch.delenv("COUNTING_STOPS_AT")
    result = execute(STAGE, CountingConfig(), Inputs(), store)
    assert result.outcome == "Resumed"
    assert result.artifact.manifest.n_launches == 2
    assert store.unfinished_ids() == []


def test_killed_at_random_moments_ends_as_an_uninterrupted_run(store, tmp_path):
    whole = execute(STAGE, CountingConfig(n=12, pause_s=0.02), Inputs(), store).artifact
    other = tmp_path / "killed"
    rng = random.Random(0)
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    for _ in range(4):
        process = subprocess.Popen([sys.executable, "-c", WORKER, str(other)], env=env)
        time.sleep(rng.uniform(0.2, 0.9))
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run([sys.executable, "-c", WORKER, str(other)], env=env, check=True)
    resumed = open_artifact(whole.id, other)
    assert resumed.digest == whole.digest
    assert tree(resumed.path) == tree(whole.path)


def test_a_locked_artifact_is_refused_at_once_and_named(store):
    name = stage_id(STAGE, CountingConfig(), {})
    with exclusive_lock(store.lock_path(name), name):
        with pytest.raises(ArtifactLockedError, match=rf"{name} is being written by process {os.getpid()}.*--wait"):
            execute(STAGE, CountingConfig(), Inputs(), store)
        assert store.is_locked(name)
    assert not store.is_locked(name)


def test_a_missing_or_shortened_file_is_found_at_opening(store):
    artifact = execute(STAGE, CountingConfig(), Inputs(), store).artifact
    victim = artifact.path / "numbers" / "3.txt"
    victim.chmod(0o644)
    victim.write_bytes(b"")
    with pytest.raises(ArtifactDamagedError, match=r"numbers/3.txt has 0 bytes.*mi-pipe rm"):
        execute(STAGE, CountingConfig(), Inputs(), store)
    victim.unlink()
    with pytest.raises(ArtifactDamagedError, match=r"numbers/3.txt is missing"):
        open_artifact(artifact.id, store)
    store.remove(artifact.id)
    assert execute(STAGE, CountingConfig(), Inputs(), store).outcome == "Completed"


def test_a_flipped_bit_is_found_by_check(store):
    artifact = execute(STAGE, CountingConfig(), Inputs(), store).artifact
    victim = artifact.path / "numbers" / "3.txt"
    victim.chmod(0o644)
    victim.write_bytes(b"8\n")
    assert open_artifact(artifact.id, store).damaged_files() == ["numbers/3.txt"]
    with pytest.raises(ArtifactDamagedError, match=r"numbers/3.txt differs"):
        open_artifact(artifact.id, store).check()


def test_an_unreadable_manifest_is_damage_not_absence(store):
    artifact = execute(STAGE, CountingConfig(), Inputs(), store).artifact
    (artifact.path / "manifest.json").write_text("{")
    with pytest.raises(ArtifactDamagedError, match=r"manifest\.json cannot be read"):
        execute(STAGE, CountingConfig(), Inputs(), store)


def test_an_input_made_anew_with_other_bytes_makes_the_result_stale(store):
    before = execute(STAGE, CountingConfig(n=2), Inputs(), store).artifact
    result = execute(STAGE, CountingConfig(n=3), Inputs(before), store)
    write_manifest(before.path, before.manifest.model_copy(update={"digest": "0" * 64}))
    again = execute(STAGE, CountingConfig(n=3), Inputs(open_artifact(before.id, store)), store)
    assert (result.outcome, again.outcome) == ("Completed", "Completed")
    assert again.artifact.inputs["before"].digest == "0" * 64


def test_a_disk_too_small_is_refused_with_numbers_and_ways_out(tmp_path):
    needed = Estimate(size_bytes=shutil.disk_usage(tmp_path).total * 2, n_units=1, unit="shard")
    with pytest.raises(DiskSpaceError, match=r"harvest-1 needs .* GB .* are free\. Free space"):
        check_disk(tmp_path, needed, "harvest-1")


def test_ids_depend_on_what_decides_the_result_and_nothing_else():
    class Choice(Config):
        k: int = 1
        """Decides."""
        device: "str" = "cpu"
        """Decides nothing."""

    class Marked(Config):
        k: int = 1
        """Decides."""

    from typing import Annotated

    class Both(Config):
        k: int = 1
        """Decides."""
        device: Annotated[str, Execution()] = "cpu"
        """Decides nothing."""

    assert Both(device="cuda").identity() == {"k": 1} == Marked().identity()
    assert stage_id(STAGE, CountingConfig(n=5), {}) != stage_id(STAGE, CountingConfig(n=6), {})
    assert stage_id(STAGE, CountingConfig(n=5), {"a": "x"}) != stage_id(STAGE, CountingConfig(n=5), {"a": "y"})
    assert stage_id(STAGE, CountingConfig(n=5), {}) == "counting-" + stage_id(STAGE, CountingConfig(), {})[-16:]
