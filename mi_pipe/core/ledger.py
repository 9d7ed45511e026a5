"""The ledger of finished units: what a killed stage need not do again.

One JSON line a unit, appended and fsynced; a torn last line (the kill came in the middle) is ignored.
The ledger lies outside the artifact's folder and goes when the artifact is published.
"""

import json
import os
from pathlib import Path
from typing import Any


class Ledger:
    """Append-only record of the units of one artifact that are done."""

    def __init__(self, path: Path) -> None:
        """Read the ledger at `path` if there is one."""
        self._path = path
        self._n_total: int | None = None
        self._elapsed_s = 0.0
        self._units: dict[str, dict[str, Any]] = {}
        for record in _whole_records(path):
            self._apply(record)

    def __contains__(self, unit: str) -> bool:
        """Say whether `unit` is done."""
        return unit in self._units

    @property
    def n_done(self) -> int:
        """Number of units done."""
        return len(self._units)

    @property
    def n_total(self) -> int | None:
        """Number of units of the whole artifact, if the stage has said it."""
        return self._n_total

    @property
    def elapsed_s(self) -> float:
        """Seconds of work in earlier launches, as far as they were recorded."""
        return self._elapsed_s

    def info(self, unit: str) -> dict[str, Any]:
        """Return what was recorded with a finished unit; raises KeyError if it is not done."""
        return self._units[unit]

    def expect(self, n_total: int) -> None:
        """Record how many units the whole artifact has."""
        if n_total != self._n_total:
            self._append({"n_total": n_total})

    def mark(self, unit: str, **info: Any) -> None:
        """Record durably that `unit` is done; call it after the unit's own files are durable."""
        self._append({"unit": unit, "info": info})

    def add_elapsed(self, seconds: float) -> None:
        """Add to the seconds of work spent so far."""
        self._append({"elapsed_s": seconds})

    def _append(self, record: dict[str, Any]) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("ab") as file:
            if file.tell() and not _ends_with_newline(self._path):
                file.write(b"\n")
            file.write(json.dumps(record, sort_keys=True).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self._apply(record)

    def _apply(self, record: dict[str, Any]) -> None:
        if "unit" in record:
            self._units[record["unit"]] = record["info"]
        self._n_total = record.get("n_total", self._n_total)
        self._elapsed_s += record.get("elapsed_s", 0.0)


def _ends_with_newline(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


def _whole_records(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    records = []
    for line in path.read_bytes().split(b"\n"):
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            records.append(record)
    return records
