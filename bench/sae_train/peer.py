"""A peer's trainer in its own python, asked over pipes to take some steps when its turn comes."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

NAMES = ("saelens", "dictionary_learning", "sparsify")
_LOG_CHARACTERS = 2000


class Peer:
    """A context with a peer's trainer running."""

    def __init__(
        self, name: str, python: str, options: dict[str, Any], folder: Path, script: Path | None = None
    ) -> None:
        self.name = name
        self._command = [python, str(script or Path(__file__).with_name(f"{name}_runner.py"))]
        self._options = options
        self._log = folder / f"{name}.log"

    def __enter__(self) -> "Peer":
        answers, write = os.pipe()
        quiet = {
            "HF_HUB_OFFLINE": "1",
            "WANDB_MODE": "disabled",
            "TQDM_DISABLE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [*self._command, json.dumps({**self._options, "answers": write})],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                pass_fds=(write,),
                env={**os.environ, **quiet},
                text=True,
            )
        os.close(write)
        self._answers = os.fdopen(answers)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()
        self._answers.close()

    def turn(self) -> tuple[float, float]:
        """Let the trainer take its steps; return wall and CPU seconds."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write("\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # its log says why, below
        line = self._answers.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended: {self._log.read_text()[-_LOG_CHARACTERS:]}")
        wall, cpu = json.loads(line)
        return wall, cpu
