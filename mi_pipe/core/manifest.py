"""The manifest: the one file whose presence means that an artifact is done, and what it says.

`digest` is the hash of the checksums of all files that are a function of config and inputs alone; files
that hold times or host facts are listed with `volatile: true` and left out of it. Later stages record the
digest of each input, so a result made from other bytes is never taken for current. `checksum` is the hash of all the
rest of the manifest, so that no altered date, figure or id in it passes unseen.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from mi_pipe.core.atomic import json_bytes, write_bytes
from mi_pipe.core.canonical import ID_DIGITS, content_hash
from mi_pipe.core.errors import ArtifactDamagedError, ArtifactIncompleteError

MANIFEST_NAME = "manifest.json"
REQUEST_NAME = "request.json"
"""In the scratch space of an unfinished artifact: its manifest as far as it is known."""
SCHEMA = "mi_pipe.manifest/2"
_CHECKSUM = "checksum"
Scalar = str | int | float | bool | None
Sources = dict[str, dict[str, Scalar]]
"""How inputs that are not in the store were found, by role."""


class FileEntry(BaseModel):
    """One file of an artifact."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    size_bytes: int
    checksum: str
    """Algorithm and hex value, such as `sha256:9f86…` (`core.checksum` has the kinds)."""
    volatile: bool = False
    """True for times and host facts, which differ between equal runs."""


class InputRef(BaseModel):
    """An input as it was when the artifact was made."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str
    digest: str


@dataclass(frozen=True)
class MadeOf:
    """What of an artifact's manifest is known before it is made; the fields are the manifest's."""

    stage: str
    stage_version: int
    config: dict[str, Any]
    inputs: dict[str, InputRef] = field(default_factory=dict)
    label: str = ""
    execution: dict[str, Any] = field(default_factory=dict)
    sources: Sources = field(default_factory=dict)


class Manifest(BaseModel):
    """What an artifact is, what it was made from, and what it holds."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_name: Literal["mi_pipe.manifest/1", "mi_pipe.manifest/2"] = SCHEMA
    """Version 1 has neither `sources` nor `checksum`."""
    id: str
    stage: str
    stage_version: int
    label: str = ""
    config: dict[str, Any]
    execution: dict[str, Any] = {}
    inputs: dict[str, InputRef]
    sources: Sources = {}
    """For a model its name, dtype and so on."""
    files: dict[str, FileEntry]
    digest: str
    summary: dict[str, Scalar]
    created_at: str
    """UTC time of publishing, ISO 8601."""
    elapsed_s: float
    """Seconds of work over all launches."""
    n_launches: int
    host: dict[str, Scalar]
    versions: dict[str, str]

    def to_json(self) -> bytes:
        """Return the bytes of the manifest's file, its checksum added."""
        content = self.model_dump(mode="json")
        return json_bytes({**content, _CHECKSUM: f"sha256:{content_hash(content)}"})

    @property
    def size_bytes(self) -> int:
        """Bytes of all files."""
        return sum(entry.size_bytes for entry in self.files.values())


def artifact_id(stage: str, version: int, config: dict[str, Any], input_ids: dict[str, str]) -> str:
    """Return `<stage>-<16 hex digits>` of the canonical JSON of what decides the result."""
    key = {"stage": stage, "version": version, "config": config, "inputs": input_ids}
    return f"{stage}-{content_hash(key)[:ID_DIGITS]}"


def digest_of(files: dict[str, FileEntry]) -> str:
    """Return the digest of an artifact's content from the checksums of its non-volatile files."""
    return content_hash({name: entry.checksum for name, entry in files.items() if not entry.volatile})


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Publish: write the manifest, the last file of an artifact, atomically."""
    write_bytes(folder / MANIFEST_NAME, manifest.to_json())


def parse_manifest(data: bytes, artifact: str) -> Manifest:
    """Return what the bytes of a manifest's file say; raises ArtifactDamagedError if they were altered."""
    try:
        content = json.loads(data)
        checksum = content.pop(_CHECKSUM, None)
        is_sealed = content.get("schema_name") != "mi_pipe.manifest/1"
        if is_sealed and checksum != f"sha256:{content_hash(content)}":
            raise ArtifactDamagedError(damage_text(artifact, f"{MANIFEST_NAME} differs from its checksum"))
        return Manifest.model_validate(content)
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ArtifactDamagedError(damage_text(artifact, f"{MANIFEST_NAME} cannot be read")) from error


def read_manifest(folder: Path) -> Manifest:
    """Read a manifest and check that every file it names is there with its size, unless it lies in an object store.

    Raises ArtifactIncompleteError without a manifest, ArtifactDamagedError if anything disagrees with it.
    """
    path = folder / MANIFEST_NAME
    if not path.exists():
        raise ArtifactIncompleteError(f"{folder.name} is not finished: {path} does not exist. Run its recipe again.")
    manifest = parse_manifest(path.read_bytes(), folder.name)
    for name in manifest.files:
        if (what := size_damage(folder, manifest, name)) is not None:
            raise ArtifactDamagedError(damage_text(folder.name, f"{name} {what}"))
    return manifest


def size_damage(folder: Path, manifest: Manifest, name: str) -> str | None:
    """Say what is wrong with the presence and size of a file in an artifact's folder, or None."""
    file = folder / name
    if not file.is_file():
        return None if manifest.execution.get("destination") else "is missing"
    found, expected = file.stat().st_size, manifest.files[name].size_bytes
    return None if found == expected else f"has {found:,} bytes, its manifest says {expected:,}"


def damage_text(artifact: str, what: str) -> str:
    """Say that an artifact is damaged and how to get a whole one."""
    return (
        f"{artifact} is damaged: {what}. `mi-pipe repair {artifact}` mends it, "
        f"or `mi-pipe rm {artifact}` removes it and the next run makes it anew."
    )
