"""Whether the parts of an activation store agree: commit records with the manifest, the group's metadata with both.

All of it follows from a few small files, so that it is asked without reading activations. Nothing here trusts a file
that it reads: what cannot be read is damage, never an error.
"""

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from mi_pipe.activations.commits import COMMITS_FOLDER, commit_name
from mi_pipe.activations.group import GROUP_NAME, PROMPT_OFFSET, ROW_ARRAYS
from mi_pipe.core.damage import Damage

if TYPE_CHECKING:
    from mi_pipe.activations.store import ActivationStore

_GROUP_METADATA = f"{GROUP_NAME}/zarr.json"
_UNREADABLE = "cannot be read"


def disagreements(store: "ActivationStore") -> list[Damage]:
    """Return the files of a store that contradict others."""
    attributes = _attributes(store)
    if attributes is None:
        return [Damage(_GROUP_METADATA, _UNREADABLE, "what the store holds")]
    return [*_of_inputs(store, attributes), *_of_arrays(store, attributes), *_of_commits(store, attributes)]


def content_of(store: "ActivationStore", name: str) -> str:
    """Say what a file holds: the rows of a shard and its hook point; "" if the name says it all."""
    folder, _, rest = name.partition("/")
    attributes = _attributes(store)
    if attributes is None:
        return ""
    if folder == COMMITS_FOLDER:
        return f"the record of {_rows(attributes, int(rest.partition('.')[0]))}"
    array, _, chunk = rest.partition("/c/")
    if folder != GROUP_NAME or not chunk:
        return ""
    if array == PROMPT_OFFSET:
        return "where each prompt begins"
    return f"{_rows(attributes, int(chunk.partition('/')[0]))} of {array}"


def _rows(attributes: dict[str, Any], shard: int) -> str:
    start, stop = _bounds(attributes, shard)
    return f"rows {start:,} to {stop:,}"


def _bounds(attributes: dict[str, Any], shard: int) -> tuple[int, int]:
    size = attributes["shard_rows"]
    return shard * size, min(attributes["n_tokens"], (shard + 1) * size)


def _json(store: "ActivationStore", name: str) -> Any:
    try:
        return json.loads(store.place.read(name))
    except (FileNotFoundError, NotADirectoryError, ValueError, RecursionError):
        return None


def _attributes(store: "ActivationStore") -> dict[str, Any] | None:
    content = _json(store, _GROUP_METADATA)
    try:
        attributes = content["attributes"]
        sizes = [attributes["shard_rows"], attributes["n_tokens"]]
        is_sound = all(isinstance(size, int) and size > 0 for size in sizes) and isinstance(attributes["hooks"], list)
    except (KeyError, TypeError):
        return None
    return attributes if is_sound else None


def _of_inputs(store: "ActivationStore", attributes: dict[str, Any]) -> Iterator[Damage]:
    for role in ("model", "prompts"):
        ref = store.inputs.get(role)
        if ref is not None and attributes.get(role) != ref.id:
            yield Damage(_GROUP_METADATA, f"names {attributes.get(role)} as {role} where the manifest has {ref.id}")


def _of_arrays(store: "ActivationStore", attributes: dict[str, Any]) -> Iterator[Damage]:
    """Compare the arrays' shapes and shards with what the group says."""
    n_rows, size = attributes["n_tokens"], attributes["shard_rows"]
    for array in [*attributes["hooks"], *ROW_ARRAYS]:
        name = f"{GROUP_NAME}/{array}/zarr.json"
        content = _json(store, name)
        try:
            found = content["shape"][0], content["chunk_grid"]["configuration"]["chunk_shape"][0]
        except (KeyError, TypeError, IndexError):
            yield Damage(name, _UNREADABLE)
            continue
        if found != (n_rows, size):
            yield Damage(name, f"has {found[0]:,} rows in shards of {found[1]:,}, the group {n_rows:,} in {size:,}")


def _of_commits(store: "ActivationStore", attributes: dict[str, Any]) -> Iterator[Damage]:
    """Compare each commit record with the plan, with the rows it should name, and with the manifest."""
    n_shards = -(-attributes["n_tokens"] // attributes["shard_rows"])
    for shard in range(n_shards):
        name, record = commit_name(shard), _json(store, commit_name(shard))
        if record is None:
            yield Damage(name, _UNREADABLE, content_of(store, name))
        elif (what := _contradiction(store, attributes, shard, record)) is not None:
            yield Damage(name, what, content_of(store, name))


def _contradiction(store: "ActivationStore", attributes: dict[str, Any], shard: int, record: Any) -> str | None:
    keys = {f"{hook}/c/{shard}/0" for hook in attributes["hooks"]}
    files = store.manifest.files
    try:
        if record["shard"] != shard or record["rows"] != list(_bounds(attributes, shard)):
            return f"is of shard {record['shard']}, rows {record['rows']}"
        if record["plan"] != attributes["plan_hash"]:
            return "is of another plan"
        recorded = {key: (size, _with_kind(checksum)) for key, (size, checksum) in record["files"].items()}
    except (KeyError, TypeError, ValueError, AttributeError):
        return _UNREADABLE
    listed = {key: files.get(f"{GROUP_NAME}/{key}") for key in keys}
    expected = {key: (entry.size_bytes, entry.checksum) for key, entry in listed.items() if entry is not None}
    return None if recorded == expected else "names other files or checksums than the manifest"


def _with_kind(checksum: str) -> str:
    """Return a checksum with its kind, which records of version 1 leave out."""
    return checksum if ":" in checksum else f"crc32c:{checksum}"
