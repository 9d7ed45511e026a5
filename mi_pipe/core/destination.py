"""Artifacts in an object store: a destination is a URL under which artifacts lie as in a store's folder.

The stage's large files go there as they are made; at publishing the small ones and, last of all, the manifest follow,
so that the place is whole by itself (`mi_pipe.open(url)`). The local folder keeps the small files and the manifest,
whose `execution.destination` says where the rest is.
"""

from pathlib import Path
from typing import Any

from mi_pipe.core.canonical import ID_DIGITS
from mi_pipe.core.errors import ArtifactNotFoundError
from mi_pipe.core.manifest import MANIFEST_NAME, Manifest, parse_manifest, write_manifest
from mi_pipe.core.place import LocalPlace, Place, open_place
from mi_pipe.core.store import Store


def destination_place(destination: str, artifact_id: str) -> Place:
    """Return the place of an artifact under a destination."""
    return open_place(artifact_url(destination, artifact_id))


def artifact_url(destination: str, artifact_id: str) -> str:
    """Return the URL of an artifact under a destination."""
    return f"{destination.rstrip('/')}/{artifact_id.rpartition('-')[0]}/{artifact_id}"


def scratch_place(destination: str, artifact_id: str) -> Place:
    """Return the scratch space of an unfinished artifact under a destination."""
    return open_place(f"{destination.rstrip('/')}/.work/{artifact_id}")


def destination_of(execution: dict[str, Any]) -> str | None:
    """Return the URL that a stage's execution fields name, if any."""
    value = execution.get("destination")
    return value if isinstance(value, str) else None


def place_of(manifest: Manifest, path: Path) -> Place:
    """Return where an artifact's files are read: its own folder if they are all there, else its destination."""
    destination = destination_of(manifest.execution)
    if destination is None or all((path / name).exists() for name in manifest.files):
        return LocalPlace(path)
    return destination_place(destination, manifest.id)


def replicate(folder: Path, place: Place, manifest: Manifest) -> None:
    """Put the files that lie in `folder` to an artifact's place, and its manifest last."""
    for name in manifest.files:
        if (folder / name).exists():
            place.write(name, (folder / name).read_bytes())
    place.write(MANIFEST_NAME, manifest.to_json())


def fetch_manifest(url: str, store: Store) -> Path:
    """Return the folder that stands for a remote artifact on this machine, with its manifest in it.

    Raises ArtifactNotFoundError if nothing is published at `url`, ArtifactDamagedError if the manifest was altered.
    """
    place = open_place(url)
    try:
        data = place.read(MANIFEST_NAME)
    except FileNotFoundError as error:
        raise ArtifactNotFoundError(f"Nothing is published at {url}: there is no {MANIFEST_NAME}.") from error
    destination, _, name = url.rstrip("/").rsplit("/", 2)
    manifest = parse_manifest(data, name)
    execution = {**manifest.execution, "destination": destination}
    folder = store.root / ".remote" / manifest.digest[:ID_DIGITS] / name
    write_manifest(folder, manifest.model_copy(update={"execution": execution}))
    return folder
