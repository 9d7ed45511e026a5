"""SIGKILLs at random moments: no committed shard is ever lost or torn, and every harvest ends with the same bytes.

`python -m tests.faults.kill_storm --kills 200` kills harvests in three settings, a third of the kills each:

- one process that makes the whole artifact, publishing included;
- three workers that fill a third of the shards each, one of them killed at a time while the others go on;
- two workers that fill the same shards.

A killed worker is started again until every shard is there; then one process finishes and publishes. After every kill
each commit record is compared with the bytes of its files, and with what it was before; after every run the whole tree
is compared with an uninterrupted one's. Workers are forked from a process that has imported everything, so a start
costs milliseconds.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from mi_pipe.activations import layout
from mi_pipe.activations.commits import COMMITS_FOLDER, read_commit
from mi_pipe.activations.group import GROUP_NAME
from mi_pipe.activations.harvest.fallback import Fallback
from mi_pipe.activations.harvest.filling import HarvestJob
from mi_pipe.activations.harvest.forward import ForwardPass
from mi_pipe.activations.store import ActivationStore
from mi_pipe.core.checksum import matches
from mi_pipe.core.place import LocalPlace
from mi_pipe.core.stage import stage_id
from mi_pipe.core.store import Store
from mi_pipe.models.source import load_source
from stages import harvest
from tests.activations.harvests import HEADS, RESIDUAL, harvest_toy, random_prompts, tree_hashes
from tests.stages.toys import toy_model

FIELDS = {"shard_rows": 512, "batch_tokens": 150, "precision": "float32"}
_CONFIG = harvest.HarvestConfig(hooks=[RESIDUAL, HEADS], device="cpu", **FIELDS)
_FALLBACK = Fallback("float16")
_LONGEST_S = 0.6
"""Most seconds to a kill; writing a shard takes about 0.02."""


@dataclass
class Toll:
    """What a storm did."""

    kills: int = 0
    lost: int = 0
    torn: int = 0
    hash_equal: bool = True
    runs: int = 0
    found_unfinished: int = 0
    """Shard files without a record and temporary files that checks have met: kills in the middle of writing."""
    by_setting: dict[str, int] = field(default_factory=dict)


class Storm:
    """One uninterrupted harvest of `n_prompts`, and others that are killed and compared with it."""

    def __init__(self, folder: Path, seed: int, n_prompts: int) -> None:
        torch.set_num_threads(1)
        self._folder = folder
        self._lengths = [25] * n_prompts + [7, 40, 64] * 30
        self._random = random.Random(seed)
        self.toll = Toll()
        self._whole = tree_hashes(self._finished(Store(folder / "whole")))

    def alone(self, n_kills: int) -> None:
        """Kill a process that makes the artifact by itself, from its first moment to its publishing."""
        while self._kills_left("alone", n_kills):
            store, seen = self._store(), dict[int, bytes]()
            while not store.is_published(self._id(store)) and self._kills_left("alone", n_kills):
                worker = _fork(partial(self._finished, store))
                time.sleep(self._random.uniform(0.0, _LONGEST_S))
                self._kill("alone", worker)
                self._check(store, seen)
            self._compare(store)

    def together(self, setting: str, n_kills: int, n_workers: int, are_same: bool) -> None:
        """Kill one of several workers at a time while the others go on."""
        while self._kills_left(setting, n_kills):
            store = self._store()
            job, forward = self._job(store)
            job.prepare(store.scratch(self._id(store)) / "group", self._attributes(store))
            shards = list(range(job.plan.layout.n_shards))
            shares = [shards if are_same else shards[i::n_workers] for i in range(n_workers)]
            workers: list[int | None] = [None] * n_workers
            seen: dict[int, bytes] = {}
            while (done := set(job.commits())) != set(shards) and self._kills_left(setting, n_kills):
                for i, share in enumerate(shares):
                    todo = [shard for shard in share if shard not in done]
                    if todo and not _is_running(workers[i]):
                        workers[i] = _fork(partial(job.fill, forward, todo))
                time.sleep(self._random.uniform(0.0, _LONGEST_S / 2))
                self._kill(setting, self._random.choice(workers))
                self._check(store, seen)
            for worker in workers:
                _wait(worker)
            self._compare(store)

    def _store(self) -> Store:
        self.toll.runs += 1
        return Store(self._folder / f"run-{self.toll.runs}")

    def _kills_left(self, setting: str, n_kills: int) -> bool:
        return self.toll.by_setting.get(setting, 0) < n_kills

    def _kill(self, setting: str, worker: int | None) -> None:
        if worker is None or not _is_running(worker):
            return
        os.kill(worker, signal.SIGKILL)
        _wait(worker)
        self.toll.kills += 1
        self.toll.by_setting[setting] = self.toll.by_setting.get(setting, 0) + 1

    def _check(self, store: Store, seen: dict[int, bytes]) -> None:
        """Compare every record with its files and with what it was at earlier checks."""
        place = LocalPlace(store.folder(self._id(store)))
        if store.is_published(self._id(store)):
            return
        records = {int(Path(key).stem): place.read(key) for key in place.keys(COMMITS_FOLDER)}
        self.toll.lost += sum(records.get(shard) != record for shard, record in seen.items())
        for shard in records:
            commit = read_commit(place, shard)
            if commit is None or not all(
                matches(place, f"{GROUP_NAME}/{key}", checksum) for key, (_, checksum) in commit.files.items()
            ):
                self.toll.torn += 1
        seen.update(records)
        shard_files = [key for key in place.keys(GROUP_NAME) if "/c/" in key and "hook_" in key]
        temporary = sum(path.name.endswith(".tmp") for path in place.root.rglob(".*"))
        self.toll.found_unfinished += max(0, len(shard_files) - 2 * len(records)) + temporary

    def _compare(self, store: Store) -> None:
        """Finish a harvest, unless it is, and compare its whole tree."""
        self.toll.hash_equal &= tree_hashes(self._finished(store)) == self._whole

    def _finished(self, store: Store) -> ActivationStore:
        return harvest_toy(store, self._lengths, **FIELDS)

    def _inputs(self, store: Store) -> harvest.Inputs:
        return harvest.Inputs(toy_model(store), random_prompts(store, self._lengths))

    def _id(self, store: Store) -> str:
        inputs = self._inputs(store)
        return stage_id(harvest.STAGE, _CONFIG, {"model": inputs.model.id, "prompts": inputs.prompts.id})

    def _attributes(self, store: Store) -> dict:
        return harvest.store_attributes(_CONFIG, self._inputs(store), _FALLBACK)

    def _job(self, store: Store) -> tuple[HarvestJob, ForwardPass]:
        """Return the job of a store's harvest, and the model ready to run."""
        inputs, name = self._inputs(store), self._id(store)
        job = harvest.make_job(
            _CONFIG, inputs, LocalPlace(store.folder(name)), LocalPlace(store.scratch(name)), _FALLBACK
        )
        return job, ForwardPass(load_source(inputs.model, "cpu", "float32"), job.hooks, "float32", "float16")


def _fork(work: Callable[[], object]) -> int:
    worker = os.fork()
    if worker == 0:
        try:
            work()
        finally:
            os._exit(0)
    return worker


def _is_running(worker: int | None) -> bool:
    if worker is None:
        return False
    try:
        return os.waitpid(worker, os.WNOHANG)[0] == 0
    except ChildProcessError:
        return False


def _wait(worker: int | None) -> None:
    with contextlib.suppress(ChildProcessError):
        if worker is not None:
            os.waitpid(worker, 0)


def storm(n_kills: int, seed: int = 0, n_prompts: int = 2400) -> Toll:
    """Kill harvests `n_kills` times, a third of them in each setting."""
    shares = [n_kills // 3 + (i < n_kills % 3) for i in range(3)]
    chunk_bytes, layout._CHUNK_BYTES = layout._CHUNK_BYTES, 8192  # several chunks in a shard
    try:
        with tempfile.TemporaryDirectory(prefix="kill-storm-") as folder:
            made = Storm(Path(folder), seed, n_prompts)
            made.alone(shares[0])
            made.together("three workers", shares[1], 3, are_same=False)
            made.together("two workers on the same shards", shares[2], 2, are_same=True)
            return made.toll
    finally:
        layout._CHUNK_BYTES = chunk_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print(json.dumps(asdict(storm(arguments.kills, arguments.seed))))


if __name__ == "__main__":
    main()
