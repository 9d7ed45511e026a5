"""SIGKILLs at random moments of SAE training: whatever the architecture, the end is that of an undisturbed run.

`python -m tests.faults.training_storm --kills 20`: for each architecture a training of 60 steps with checkpoints as
often as they can be written is killed that many times, each time at a random moment after it was started again, and
then left to finish. Steps are made to take 2 ms longer, so that kills are spread over them. The digests of all files of
the artifact are compared. Processes are forked from one that has imported everything.
"""

import argparse
import json
import os
import random
import shutil
import signal
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from mi_pipe.core.stage import execute
from mi_pipe.core.store import Store
from stages import train_saes
from tests.saes.test_training import ARCHITECTURES
from tests.stages.sae_toy import FIRST, sae_inputs, slow_steps, toy_config

_STEP_S = 0.002
_LONGEST_S = 0.25
"""Most seconds to a kill; the whole training takes about one."""


def storm(architecture: str, n_kills: int, folder: Path, chance: random.Random) -> dict[str, object]:
    """Kill the training of one architecture `n_kills` times; return what came of it."""
    torch.set_num_threads(1)
    config = toy_config(hooks=[FIRST], architecture=architecture, evaluation={"n_prompts": 2}, sparsity={"k_start": 8})
    shared = Store(folder / "shared")
    inputs = sae_inputs(shared)
    whole = execute(train_saes.STAGE, config, inputs, shared).artifact
    kills, are_equal, n_trainings = 0, True, 0
    while kills < n_kills:
        n_trainings += 1
        root = folder / f"killed-{n_trainings}"
        shutil.copytree(shared.root, root, ignore=shutil.ignore_patterns("train_saes", ".work"))
        store = Store(root)
        while kills < n_kills and not store.is_published(whole.id):
            kills += os.WIFSIGNALED(_killed_after(chance.uniform(0.02, _LONGEST_S), config, inputs, store))
        are_equal &= execute(train_saes.STAGE, config, inputs, store).artifact.digest == whole.digest
    return {"architecture": architecture, "kills": kills, "trainings": n_trainings, "hash_equal": are_equal}


def _killed_after(seconds: float, config, inputs, store: Store) -> int:
    child = os.fork()
    if child == 0:
        os.close(1)
        os.open(os.devnull, os.O_WRONLY)
        slow_steps(_STEP_S)
        execute(train_saes.STAGE, config, inputs, store)
        os._exit(0)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1]


def main() -> None:
    """Run the storms and print one JSON line for each architecture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="kills of each architecture's training")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    chance = random.Random(asked.seed)
    for architecture in ARCHITECTURES:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(storm(architecture, asked.kills, Path(folder), chance)), flush=True)


if __name__ == "__main__":
    main()
