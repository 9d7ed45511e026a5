"""Whether the parts of an activation store agree: commit records with the manifest, the group's metadata with both.

All of it follows from a few small files, so that it is asked without reading activations. A file that differs from its
checksum is damage by itself, and nothing is concluded from it.
"""

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from mi_pipe.activations.commits import COMMITS_FOLDER, commit_name
from mi_pipe.activations.group import GROUP_NAME, PROMPT_OFFSET, ROW_ARRAYS
from mi_pipe.core.checksum import data_matches
from mi_pipe.core.damage import Damage

if TYPE_CHECKING:
    from mi_pipe.activations.store import ActivationStore

_GROUP_METADATA = f"{GROUP_NAME}/zarr.json"
_DIFFERS = "differs from its checksum"


def disagreements(store: "ActivationStore") -> list[Damage]:
    """Return the metadata and commit records of a store that are altered, or contradict others."""
    attributes = _attributes(store)
    if attributes is None:
        return [Damage(_GROUP_METADATA, _DIFFERS)]
    return [*_of_inputs(store, attributes), *_of_arrays(store, attributes), *_of_commits(store, attributes)]


def content_of(store: "ActivationStore", name: str) -> str:
    """Say what a file holds: the rows of a shard and its hook point; "" if the name says it all."""
    folder, _, rest = name.partition("/")
    if folder == COMMITS_FOLDER:
        return f"the record of {_rows(store, int(rest.partition('.')[0]))}"
    array, _, chunk = rest.partition("/c/")
    if folder != GROUP_NAME or not chunk:
        return ""
    return "" if array == PROMPT_OFFSET else f"{_rows(store, int(chunk.partition('/')[0]))} of {array}"


def _rows(store: "ActivationStore", shard: int) -> str:
    """Name the rows of a shard by whichever file can still be trusted."""
    attributes, record = _attributes(store), _trusted(store, commit_name(shard))
    if attributes is not None:
        start, stop = _bounds(attributes, shard)
    elif record is not None:
        start, stop = record["rows"]
    else:
        return f"shard {shard}"
    return f"rows {start:,} to {stop:,}"


def _bounds(attributes: dict[str, Any], shard: int) -> tuple[int, int]:
    size = attributes["shard_rows"]
    return shard * size, min(attributes["n_tokens"], (shard + 1) * size)


def _trusted(store: "ActivationStore", name: str) -> Any:
    """Return what a JSON file says, or None if it is not what was published."""
    entry = store.manifest.files.get(name)
    try:
        data = store.place.read(name)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return json.loads(data) if entry is not None and data_matches(data, entry.checksum) else None


def _attributes(store: "ActivationStore") -> dict[str, Any] | None:
    content = _trusted(store, _GROUP_METADATA)
    return None if content is None else content["attributes"]


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
        content = _trusted(store, name)
        if content is None:
            yield Damage(name, _DIFFERS)
            continue
        found = content["shape"][0], content["chunk_grid"]["configuration"]["chunk_shape"][0]
        if found != (n_rows, size):
            yield Damage(name, f"has {found[0]:,} rows in shards of {found[1]:,}, the group {n_rows:,} in {size:,}")


def _of_commits(store: "ActivationStore", attributes: dict[str, Any]) -> Iterator[Damage]:
    """Compare each commit record with the plan, with the rows it should name, and with the manifest."""
    for shard in range(-(-attributes["n_tokens"] // attributes["shard_rows"])):
        name = commit_name(shard)
        record = _trusted(store, name)
        what = _DIFFERS if record is None else _contradiction(store, attributes, shard, record)
        if what is not None:
            yield Damage(name, what, content_of(store, name))


def _contradiction(store: "ActivationStore", attributes: dict[str, Any], shard: int, record: Any) -> str | None:
    if record["shard"] != shard or record["rows"] != list(_bounds(attributes, shard)):
        return f"is of shard {record['shard']}, rows {record['rows']}"
    if record["plan"] != attributes["plan_hash"]:
        return "is of another plan"
    keys = [f"{hook}/c/{shard}/0" for hook in attributes["hooks"]]
    entries = {key: store.manifest.files.get(f"{GROUP_NAME}/{key}") for key in keys}
    expected = {key: [entry.size_bytes, entry.checksum] for key, entry in entries.items() if entry is not None}
    recorded = {key: [size, _with_kind(checksum)] for key, (size, checksum) in record["files"].items()}
    return None if recorded == expected else "names other files or checksums than the manifest"


def _with_kind(checksum: str) -> str:
    """Return a checksum with its kind, which records of version 1 leave out."""
    return checksum if ":" in checksum else f"crc32c:{checksum}"
