"""Commit records: one JSON file a shard, written after the shard's files are durable; they alone say it is done.

`commits/000012.json`: {shard, rows: [start, stop], plan, files: {key: [size_bytes, crc32c]}}, the keys relative to
the group. No times in it, so a shard done twice gives the same record.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from mi_pipe.activations.layout import StoreLayout
from mi_pipe.core.atomic import write_json

COMMITS_FOLDER = "commits"


@dataclass(frozen=True)
class Commit:
    """What one finished shard consists of."""

    shard: int
    rows: tuple[int, int]
    plan: str
    files: dict[str, tuple[int, str]]
    """Key in the group to size in bytes and CRC-32C (8 hex digits)."""


def commit_name(shard: int) -> str:
    """Return the file name of a shard's record.

    >>> commit_name(12)
    'commits/000012.json'
    """
    return f"{COMMITS_FOLDER}/{shard:06d}.json"


def write_commit(folder: Path, commit: Commit) -> None:
    """Write a record below the artifact's folder, atomically and durably."""
    record = {
        "shard": commit.shard,
        "rows": list(commit.rows),
        "plan": commit.plan,
        "files": {key: list(entry) for key, entry in commit.files.items()},
    }
    write_json(folder / commit_name(commit.shard), record)


def read_commit(folder: Path, shard: int) -> Commit | None:
    """Return a shard's record, or None if there is none that can be read."""
    try:
        record = json.loads((folder / commit_name(shard)).read_bytes())
        start, stop = record["rows"]
        files = {str(key): (int(size), str(crc)) for key, (size, crc) in record["files"].items()}
        return Commit(int(record["shard"]), (int(start), int(stop)), str(record["plan"]), files)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def committed(folder: Path, group: Path, layout: StoreLayout, plan: str, shard: int) -> Commit | None:
    """Return a shard's record if the shard is done: same plan, all files there with their sizes; else None."""
    commit = read_commit(folder, shard)
    if commit is None or commit.plan != plan or commit.shard != shard or commit.rows != layout.bounds(shard):
        return None
    keys = {array.key(shard) for array in layout.arrays}
    if set(commit.files) != keys:
        return None
    whole = all(_has_size(group / key, size) for key, (size, _) in commit.files.items())
    return commit if whole else None


def _has_size(path: Path, size_bytes: int) -> bool:
    return path.is_file() and path.stat().st_size == size_bytes
