"""The write side of an artifact: the folder a stage fills, its scratch space and its ledger.

Files go into the artifact's final folder under atomic writes; scratch (checkpoints) and the ledger lie
apart and go at publishing. Nothing counts until `publish` has written the manifest.
"""

import contextlib
import datetime
import hashlib
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mi_pipe.core import atomic
from mi_pipe.core.canonical import file_sha256
from mi_pipe.core.destination import destination_place, replicate, scratch_place
from mi_pipe.core.host import host_facts, package_versions
from mi_pipe.core.ledger import Ledger
from mi_pipe.core.manifest import (
    MANIFEST_NAME,
    REQUEST_NAME,
    FileEntry,
    MadeOf,
    Manifest,
    Scalar,
    digest_of,
    write_manifest,
)
from mi_pipe.core.place import LocalPlace, Place
from mi_pipe.core.pool import Pool
from mi_pipe.core.progress import Progress

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

_LAUNCH = "launch"
_READ_ONLY = 0o444


class Workspace:
    """What a stage gets to write one artifact; made by the runner, under the artifact's lock."""

    def __init__(
        self,
        artifact_id: str,
        folder: Path,
        scratch: Path,
        progress: Progress | None = None,
        pool: Pool | None = None,
    ) -> None:
        """Open or reopen the workspace of an artifact; `folder` is its final place, `pool` who may share the work."""
        self.pool = pool
        self.id = artifact_id
        self.folder = folder
        self.scratch = scratch
        self.progress = progress or Progress()
        atomic.make_folder(folder)
        atomic.make_folder(scratch)
        atomic.sweep_temporary(folder)
        atomic.sweep_temporary(scratch)
        self.ledger = Ledger(scratch / "ledger.jsonl")
        launches = Ledger(scratch / "launches.jsonl")
        self.n_launches = launches.n_done + 1
        self.is_resumed = self.ledger.n_done > 0 or any(folder.iterdir())
        launches.mark(f"{_LAUNCH} {self.n_launches}")
        self._started = time.monotonic()
        self._entries: dict[str, FileEntry] = {}
        self._remote: Place | None = None
        self._remote_scratch: Place | None = None
        self._volatile: set[str] = set()

    def path(self, name: str) -> Path:
        """Return the final path of a file, its folder made; write it with `core.atomic` or a method below."""
        path = self.folder / name
        atomic.make_folder(path.parent)
        return path

    def write_table(self, name: str, frame: "pd.DataFrame") -> None:
        """Write a Parquet table (zstd) whose bytes depend on the frame alone."""
        with atomic.atomic_path(self.path(name)) as temp:
            frame.to_parquet(temp, engine="pyarrow", compression="zstd", index=False)

    def write_tensors(self, name: str, tensors: "dict[str, Tensor]") -> None:
        """Write a safetensors file, names sorted."""
        from safetensors.torch import save_file

        with atomic.atomic_path(self.path(name)) as temp:
            save_file({key: tensors[key].detach().cpu().contiguous() for key in sorted(tensors)}, temp)

    def write_json(self, name: str, value: Any) -> None:
        """Write a JSON file."""
        atomic.write_json(self.path(name), value)

    def place_at(self, destination: str | None) -> Place:
        """Return where large files go: this folder, or the artifact's place under a URL, where all files go then."""
        if destination is None:
            return LocalPlace(self.folder)
        self._remote = destination_place(destination, self.id)
        return self._remote

    def scratch_at(self, destination: str | None) -> Place:
        """Return the scratch space that belongs to `place_at`."""
        if destination is None:
            return LocalPlace(self.scratch)
        self._remote_scratch = scratch_place(destination, self.id)
        return self._remote_scratch

    def checksum(self, name: str, checksum: str, size_bytes: int) -> None:
        """Give the checksum (`core.checksum`) and size of a file, computed while writing, to save reading it again."""
        self._entries[name] = FileEntry(size_bytes=size_bytes, checksum=checksum)

    def volatile(self, name: str) -> None:
        """Say that a file holds times or host facts and is not part of the digest."""
        self._volatile.add(name)

    def pause(self) -> None:
        """Record the seconds of this launch, when the stage ends early."""
        # On a full disk the seconds are lost, and the error that ended the stage is not.
        with contextlib.suppress(OSError):
            self.ledger.add_elapsed(time.monotonic() - self._started)

    def begin(self, made_of: MadeOf) -> None:
        """Note what is being made, as a manifest without files, so that anyone can go on with it or look at it."""
        atomic.write_bytes(self.scratch / REQUEST_NAME, self._manifest(made_of, {}, {}).to_json())

    def publish(self, made_of: MadeOf, summary: dict[str, Scalar] | None = None) -> Manifest:
        """Write the manifest, make the files read-only and remove the scratch space."""
        files = {name: self._entry(name) for name in self._file_names()}
        manifest = self._manifest(made_of, files, summary or {})
        if self._remote is not None:
            replicate(self.folder, self._remote, manifest)
        for name in files:
            if (self.folder / name).exists():
                (self.folder / name).chmod(_READ_ONLY)
        write_manifest(self.folder, manifest)
        shutil.rmtree(self.scratch)
        if self._remote_scratch is not None:
            for key in list(self._remote_scratch.keys()):
                self._remote_scratch.remove(key)
        return manifest

    def _manifest(self, made_of: MadeOf, files: dict[str, FileEntry], summary: dict[str, Scalar]) -> Manifest:
        return Manifest(
            id=self.id,
            **vars(made_of),
            files=files,
            digest=digest_of(files),
            summary=summary,
            created_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            elapsed_s=round(self.ledger.elapsed_s + time.monotonic() - self._started, 3),
            n_launches=self.n_launches,
            host=host_facts(),
            versions=package_versions(),
        )

    def _file_names(self) -> list[str]:
        """Return the files of the artifact: those of its folder, and those already at its destination."""
        places = [LocalPlace(self.folder), *([self._remote] if self._remote else [])]
        return sorted({name for place in places for name in place.keys()} - {MANIFEST_NAME})  # noqa: SIM118

    def _entry(self, name: str) -> FileEntry:
        if name in self._entries:
            return self._entries[name]
        path = self.folder / name
        if not path.exists() and self._remote is not None:
            data = self._remote.read(name)
            return FileEntry(size_bytes=len(data), checksum=f"sha256:{hashlib.sha256(data).hexdigest()}")
        checksum = f"sha256:{file_sha256(path)}"
        return FileEntry(size_bytes=path.stat().st_size, checksum=checksum, volatile=name in self._volatile)
