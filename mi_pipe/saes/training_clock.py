"""Seconds of a training: how many waited for data, when a checkpoint was last written and a line last logged."""

import time
from collections.abc import Generator
from typing import Any

from torch import Tensor

_LOG_S = 60.0


class TrainingClock:
    """Seconds of training, and those of them that were spent waiting for data."""

    def __init__(self) -> None:
        """Begin now."""
        self._waited = 0.0
        self._since = self._saved_at = self._logged_at = time.monotonic()
        self._tokens = 0

    def timed(self, batches: Generator[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Return the next batch, and add the time that it took to the time waited."""
        started = time.monotonic()
        batch = next(batches)
        self._waited += time.monotonic() - started
        self._tokens += len(next(iter(batch.values())))
        return batch

    def row(self, step: int, tokens: int, n_saes: int, label: str) -> dict[str, Any]:
        """Return speed and share of waiting since the last row."""
        now = time.monotonic()
        seconds, waited, n_tokens = now - self._since, self._waited, self._tokens
        self._since, self._waited, self._tokens = now, 0.0, 0
        return {
            **{"site": label, "step": step, "tokens": tokens, "n_saes": n_saes, "seconds": seconds},
            **{"tokens_per_s": n_tokens / seconds, "waiting_share": waited / seconds},
        }

    def is_log_due(self) -> bool:
        """Say whether it is time for a line in the log, once a minute."""
        is_due = time.monotonic() - self._logged_at >= _LOG_S
        if is_due:
            self._logged_at = time.monotonic()
        return is_due

    @property
    def seconds_since_saved(self) -> float:
        """Seconds since the last checkpoint, or since the beginning."""
        return time.monotonic() - self._saved_at

    def saved(self) -> None:
        """Take note of a checkpoint."""
        self._saved_at = time.monotonic()
