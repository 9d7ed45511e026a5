"""Commit records: one JSON file a shard, written after the shard's files are durable; they alone say it is done.

`commits/000012.json`: {shard, rows: [start, stop], plan, files: {key: [size_bytes, checksum]}}, the keys relative to
the group. No times in it, so a shard done twice gives the same record.
"""

import json
from dataclasses import dataclass

from mi_pipe.activations.group import GROUP_NAME
from mi_pipe.activations.layout import StoreLayout
from mi_pipe.core.atomic import json_bytes
from mi_pipe.core.checksum import CHUNKS
from mi_pipe.core.errors import StageError
from mi_pipe.core.place import Place

COMMITS_FOLDER = "commits"


@dataclass(frozen=True)
class Commit:
    """What one finished shard consists of."""

    shard: int
    rows: tuple[int, int]
    plan: str
    files: dict[str, tuple[int, str]]
    """Key in the group to size in bytes and checksum (`core.checksum`)."""


def commit_name(shard: int) -> str:
    """Return the file name of a shard's record.

    >>> commit_name(12)
    'commits/000012.json'
    """
    return f"{COMMITS_FOLDER}/{shard:06d}.json"


def write_commit(place: Place, commit: Commit) -> None:
    """Write a record at an artifact's place, once; raises StageError if another writer's differs from it."""
    record = {
        "shard": commit.shard,
        "rows": list(commit.rows),
        "plan": commit.plan,
        "files": {key: list(entry) for key, entry in commit.files.items()},
    }
    if not place.create(commit_name(commit.shard), json_bytes(record)):
        raise StageError(conflict_text(place, commit.shard))


def conflict_text(place: Place, shard: int) -> str:
    """Say that two writers of one shard disagree."""
    return (
        f"Shard {shard} in {place.url} was committed with other bytes than this run computed: another machine or "
        "another version of torch is filling the same store. Let one of them finish alone."
    )


def read_commit(place: Place, shard: int) -> Commit | None:
    """Return a shard's record, or None if there is none of this version that can be read."""
    try:
        record = json.loads(place.read(commit_name(shard)))
        start, stop = record["rows"]
        files = {str(key): (int(size), str(checksum)) for key, (size, checksum) in record["files"].items()}
        if not all(checksum.startswith(f"{CHUNKS}:") for _, checksum in files.values()):
            return None
        return Commit(int(record["shard"]), (int(start), int(stop)), str(record["plan"]), files)
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        return None


def committed(place: Place, layout: StoreLayout, plan: str, shard: int) -> Commit | None:
    """Return a shard's record if the shard is done: same plan, all files there with their sizes; else None."""
    commit = read_commit(place, shard)
    if commit is None or commit.plan != plan or commit.shard != shard or commit.rows != layout.bounds(shard):
        return None
    keys = {array.key(shard) for array in layout.arrays}
    if set(commit.files) != keys:
        return None
    whole = all(place.size(f"{GROUP_NAME}/{key}") == size for key, (size, _) in commit.files.items())
    return commit if whole else None
