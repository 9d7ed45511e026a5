"""Puts files that were made again into a damaged artifact, if they are what was published, byte for byte.

A file is replaced whole or not at all, and each by itself, so a repair that is killed leaves an artifact that is still
damaged, less so than before.
"""

import hashlib
from collections.abc import Iterable
from pathlib import Path

from mi_pipe.core.artifact import Artifact
from mi_pipe.core.checksum import data_matches
from mi_pipe.core.errors import StageError
from mi_pipe.core.host import host_facts, package_versions
from mi_pipe.core.manifest import FileEntry
from mi_pipe.core.place import LocalPlace

_READ_ONLY = 0o444
_MOST_NAMED = 3


class Mender:
    """Takes files from a folder in which they were made again."""

    def __init__(self, artifact: Artifact, made_again: Path) -> None:
        """Mend `artifact`, whose lock the caller holds."""
        self._artifact = artifact
        self._made_again = made_again
        self.mended: list[str] = []

    def install(self, names: Iterable[str]) -> None:
        """Replace these files; raises StageError if any came out with other bytes, which are then not taken."""
        differing = [name for name in names if not self._install(name)]
        if differing:
            raise StageError(self._differing_text(differing))

    def renew(self, names: Iterable[str]) -> dict[str, FileEntry]:
        """Replace files of times, which never come out the same, and return what the manifest has to say of them.

        Raises StageError if one was not made again.
        """
        renewed: dict[str, FileEntry] = {}
        for name in names:
            if not (self._made_again / name).exists():
                raise StageError(self._differing_text([name]))
            data = (self._made_again / name).read_bytes()
            self._replace(name, data)
            checksum = f"sha256:{hashlib.sha256(data).hexdigest()}"
            renewed[name] = FileEntry(size_bytes=len(data), checksum=checksum, volatile=True)
        return renewed

    def _install(self, name: str) -> bool:
        try:
            data = (self._made_again / name).read_bytes()
        except FileNotFoundError:
            return False
        if not data_matches(data, self._artifact.manifest.files[name].checksum):
            return False
        self._replace(name, data)
        return True

    def _replace(self, name: str, data: bytes) -> None:
        local = LocalPlace(self._artifact.path)
        is_local = isinstance(self._artifact.place, LocalPlace)
        if not is_local:
            self._artifact.place.write(name, data)
        if is_local or local.size(name) is not None:
            local.write(name, data)
            (local.root / name).chmod(_READ_ONLY)
        self.mended.append(name)

    def _differing_text(self, names: list[str]) -> str:
        shown = ", ".join(names[:_MOST_NAMED]) + (" and others" if len(names) > _MOST_NAMED else "")
        artifact = self._artifact.id
        changes = self._changes()
        why = f" It was made elsewhere ({changes})." if changes else ""
        return (
            f"{artifact} cannot be mended here: {shown} came out with other bytes than were published, and stays as it "
            f"is.{why} Repair it on a machine like the one that made it, or `mi-pipe rm {artifact}` and run its recipe."
        )

    def _changes(self) -> str:
        """Say what of the machine and the packages is not what it was."""
        manifest = self._artifact.manifest
        before, now = {**manifest.host, **manifest.versions}, {**host_facts(), **package_versions()}
        changed = [name for name, value in before.items() if value != now.get(name)]
        return ", ".join(f"{name} {before[name]}, here {now.get(name)}" for name in changed)
