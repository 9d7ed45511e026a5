"""Lets a trainer take its turn when it is asked to, and tells how long it took; runs in a peer's own python.

A line on the standard input is a turn. The trainer asks for batches as it always does; the first batch of a turn waits
for the line, and the request after the last one ends the turn: its seconds go out as a JSON line, and the trainer waits
for the next line or, when the input ends, is told that there are no more batches.
"""

import json
import os
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch


class Turns:
    """The turns of one trainer."""

    def __init__(self) -> None:
        """Read the options, a JSON object in the first argument."""
        self.options: dict[str, Any] = json.loads(sys.argv[1])
        torch.set_num_threads(self.options["n_threads"])
        torch.manual_seed(0)
        self.rows = torch.from_numpy(np.load(self.options["rows"]))
        self._n_left = 0
        self._started: tuple[float, float] | None = None

    def has_next(self) -> bool:
        """Say, where the trainer asks for a batch, whether there is one."""
        if not self._n_left:
            if self._started:
                seconds = time.perf_counter() - self._started[0], time.process_time() - self._started[1]
                os.write(self.options["answers"], (json.dumps(seconds) + "\n").encode())
            if not sys.stdin.readline():
                return False
            self._n_left = self.options["n_steps"]
            self._started = time.perf_counter(), time.process_time()
        self._n_left -= 1
        return True

    def batches(self) -> Iterator[torch.Tensor]:
        """Iterate over batches of rows in random order, from memory."""
        n_batch, random = self.options["batch_rows"], torch.Generator().manual_seed(0)
        while True:
            order = torch.randperm(len(self.rows), generator=random)
            for places in order.split(n_batch)[: len(self.rows) // n_batch]:
                if not self.has_next():
                    return
                yield self.rows[places]
