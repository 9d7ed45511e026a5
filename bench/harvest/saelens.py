"""SAELens' CacheActivationsRunner beside a harvest: another python, asked over pipes to run when its turn comes."""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int

from bench.harvest.clock import Speed

PYTHON_VARIABLE = "MI_PIPE_BENCH_SAELENS"


class SAELens:
    """A context with SAELens running in its own virtual environment."""

    def __init__(
        self, home: Path, prompts: Int[np.ndarray, "prompt pos"], hook: str, d_model: int, n_batch: int
    ) -> None:
        self._folder = home / "saelens"
        self._folder.mkdir()
        np.save(self._folder / "tokens.npy", prompts)
        self._environment = {
            **os.environ,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_OFFLINE": "1",
            "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        }
        self._options = {
            "tokens": str(self._folder / "tokens.npy"),
            "hook": hook,
            "d_model": d_model,
            "batch_prompts": n_batch,
            "n_threads": torch.get_num_threads(),
        }
        self._n_calls = 0

    def __enter__(self) -> "SAELens":
        answers, write = os.pipe()
        script = Path(__file__).with_name("saelens_runner.py")
        command = [os.environ[PYTHON_VARIABLE], str(script), json.dumps({**self._options, "answers": write})]
        log = (self._folder / "log").open("w")
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, pass_fds=(write,), env=self._environment, text=True, stdout=log, stderr=log
        )
        os.close(write)
        self._answers = os.fdopen(answers)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()
        self._answers.close()

    def run(self) -> Speed:
        """Cache the activations once into a fresh folder."""
        assert self._process.stdin is not None
        self._n_calls += 1
        self._process.stdin.write(f"{self._folder / str(self._n_calls)}\n")
        self._process.stdin.flush()
        line = self._answers.readline()
        if not line:
            raise RuntimeError(f"SAELens ended: {(self._folder / 'log').read_text()[-2000:]}")
        answer = json.loads(line)
        return Speed(answer["tokens"] / answer["wall"], answer["tokens"] / answer["cpu"])
