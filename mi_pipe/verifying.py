"""Says whether a published artifact, here or in an object store, is what was published.

Other than `mi_pipe.open`, which stops at the first damage, this names all of it, a damaged manifest too.
"""

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path

from mi_pipe.core.atomic import json_bytes
from mi_pipe.core.damage import Damage, find_damage
from mi_pipe.core.destination import fetch_manifest
from mi_pipe.core.errors import ArtifactDamagedError, ArtifactNotFoundError
from mi_pipe.core.manifest import MANIFEST_NAME, Manifest, parse_manifest
from mi_pipe.core.place import LocalPlace, Place, is_url, open_place
from mi_pipe.core.progress import Progress
from mi_pipe.core.store import Store
from mi_pipe.opening import view_of


@dataclass(frozen=True)
class Verification:
    """What was compared, and what was damaged."""

    id: str
    n_files: int
    size_bytes: int
    damage: tuple[Damage, ...]
    manifest: Manifest | None
    """None if it cannot be trusted."""

    @property
    def is_whole(self) -> bool:
        """Say whether nothing is damaged."""
        return not self.damage


def verify(
    id_or_url: str,
    store: Store | str | os.PathLike[str] | None = None,
    deep: bool = False,
    progress: Progress | None = None,
) -> Verification:
    """Compare an artifact with its manifest; with `deep` every byte, else presence, sizes and records.

    `id_or_url` is an id, the beginning of one, a folder or a URL. Raises ArtifactNotFoundError or
    ArtifactIncompleteError if nothing is published there, PlaceError if the object store cannot be reached.
    """
    where = store if isinstance(store, Store) else Store(store)
    place, name = _locate(id_or_url, where)
    damage = manifest_damage(place, name)
    if damage is not None:
        return Verification(name, 1, 0, (damage,), None)
    path = fetch_manifest(place.url, where) if not isinstance(place, LocalPlace) else place.root
    manifest = parse_manifest((path / MANIFEST_NAME).read_bytes(), name)
    artifact = view_of(manifest)(path, manifest)
    found = find_damage(artifact, deep, progress)
    if not isinstance(artifact.place, LocalPlace) and (damage := manifest_damage(artifact.place, name)):
        found.append(replace(damage, content=f"at {artifact.place.url}"))
    return Verification(name, len(manifest.files) + 1, manifest.size_bytes, tuple(found), manifest)


def manifest_damage(place: Place, name: str) -> Damage | None:
    """Say what is wrong with an artifact's manifest, down to its bytes."""
    try:
        data = place.read(MANIFEST_NAME)
        manifest = parse_manifest(data, name)
    except FileNotFoundError:
        return Damage(MANIFEST_NAME, "is missing")
    except ArtifactDamagedError:
        return Damage(MANIFEST_NAME, "differs from its checksum")
    if json_bytes(json.loads(data)) != data:
        return Damage(MANIFEST_NAME, "has other bytes than were published")
    return None if manifest.id == name else Damage(MANIFEST_NAME, f"is that of {manifest.id}")


def _locate(id_or_url: str, store: Store) -> tuple[Place, str]:
    """Return where an artifact lies and its id; an artifact that lost its manifest is found by its whole id."""
    if is_url(id_or_url):
        place = open_place(id_or_url)
        if place.size(MANIFEST_NAME) is None:
            raise ArtifactNotFoundError(f"Nothing is published at {id_or_url}: there is no {MANIFEST_NAME}.")
        return place, id_or_url.rstrip("/").rpartition("/")[2]
    if (Path(id_or_url) / MANIFEST_NAME).exists():
        path = Path(id_or_url).absolute()
        return LocalPlace(path), path.name
    name = id_or_url if store.has_lost_manifest(id_or_url) else store.find(id_or_url)
    return LocalPlace(store.folder(name)), name
