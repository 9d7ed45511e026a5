"""A stage small enough to reason about: writes its numbers one file at a time, so that it can be killed between."""

import os
import time
from dataclasses import dataclass

from mi_pipe.core import atomic
from mi_pipe.core.config import Config
from mi_pipe.core.stage import Estimate, Stage


@dataclass(frozen=True)
class Inputs:
    before: object = None


class CountingConfig(Config):
    n: int = 5
    """How many files."""
    pause_s: float = 0.0
    """Seconds a file."""


def run(config, inputs, work):
    work.ledger.expect(config.n)
    for i in range(config.n):
        if str(i) not in work.ledger:
            time.sleep(config.pause_s)
            atomic.write_bytes(work.path(f"numbers/{i}.txt"), f"{i * i}\n".encode())
            work.ledger.mark(str(i))
        work.progress.update(i + 1, config.n, "files")
        if os.environ.get("COUNTING_STOPS_AT") == str(i):
            raise RuntimeError("stopped for the test")
    return {"n": config.n, "total": sum(i * i for i in range(config.n))}


STAGE = Stage(
    "counting", 1, CountingConfig, Inputs, run, lambda config, inputs: Estimate(100 * config.n, config.n, "file")
)
