"""What of an artifact differs from what was published: files missing, of another size, or with other bytes."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

from mi_pipe.core.checksum import matches
from mi_pipe.core.manifest import MANIFEST_NAME, FileEntry, digest_of
from mi_pipe.core.place import LocalPlace, Place
from mi_pipe.core.progress import Progress

if TYPE_CHECKING:
    from mi_pipe.core.artifact import Artifact

_LOCAL_THREADS, _REMOTE_THREADS = 4, 16


@dataclass(frozen=True)
class Damage:
    """One file of an artifact that is not what was published."""

    file: str
    what: str
    """What is wrong with it: "is missing"."""
    content: str = ""
    """What it holds: "rows 64 to 128 of blocks.0.hook_resid_post"."""

    def __str__(self) -> str:
        """Say it in one line."""
        return f"{self.file} {self.what}" + (f" ({self.content})" if self.content else "")


def find_damage(artifact: "Artifact", deep: bool = False, progress: Progress | None = None) -> list[Damage]:
    """Return what is damaged of an artifact whose manifest could be read; `deep` reads every byte.

    Without `deep` presence, sizes, the digest and what the kind of artifact says of itself are compared.
    """
    found: dict[str, Damage] = {}
    if digest_of(artifact.manifest.files) != artifact.digest:
        found[MANIFEST_NAME] = Damage(MANIFEST_NAME, "has a digest that is not that of its files")
    for name, what in _compared(artifact, deep, progress or Progress()):
        if what is not None:
            found.setdefault(name, Damage(name, what, artifact.content_of(name)))
    for damage in artifact.disagreements():
        found.setdefault(damage.file, damage)
    return list(found.values())


def _compared(artifact: "Artifact", deep: bool, progress: Progress) -> Iterator[tuple[str, str | None]]:
    """Yield what is wrong with each file, several looked at once."""
    files, local = artifact.manifest.files, LocalPlace(artifact.path)
    is_local = isinstance(artifact.place, LocalPlace)

    def look(name: str) -> str | None:
        what = _compare(artifact.place, name, files[name], deep)
        has_copy = not is_local and local.size(name) is not None
        return _compare(local, name, files[name], deep) if what is None and has_copy else what

    done = accumulate(entry.size_bytes for entry in files.values())
    with ThreadPoolExecutor(_LOCAL_THREADS if is_local else _REMOTE_THREADS) as pool:
        for name, what, n_bytes in zip(files, pool.map(look, files), done, strict=True):
            progress.update(n_bytes, artifact.size_bytes, "bytes")
            yield name, what


def _compare(place: Place, name: str, entry: FileEntry, deep: bool) -> str | None:
    found = place.size(name)
    if found is None:
        return "is missing"
    if found != entry.size_bytes:
        return f"has {found:,} bytes instead of {entry.size_bytes:,}"
    return None if not deep or matches(place, name, entry.checksum) else "differs from its checksum"
