"""The store: one folder, one sub-folder a stage, one folder an artifact; no index to go stale.

<store>/<stage>/<id>/manifest.json and the artifact's files
<store>/models/<name>/             converted models
<store>/.work/<id>/                ledger and checkpoints of unfinished artifacts
<store>/.locks/<id>.lock           one writer at a time
"""

import os
import shutil
from pathlib import Path

from mi_pipe.core.errors import ArtifactIncompleteError, ArtifactNotFoundError, near_names
from mi_pipe.core.ledger import Ledger
from mi_pipe.core.lock import exclusive_lock, is_locked
from mi_pipe.core.manifest import MANIFEST_NAME

STORE_VARIABLE = "MI_PIPE_STORE"
DEFAULT_STORE = "data/store"


class Store:
    """A folder of artifacts."""

    def __init__(self, root: str | os.PathLike[str] | None = None) -> None:
        """Use `root`, or else the variable MI_PIPE_STORE, or else `data/store` below the working folder."""
        self.root = Path(root or os.environ.get(STORE_VARIABLE) or DEFAULT_STORE).expanduser().absolute()

    def folder(self, artifact_id: str) -> Path:
        """Return the folder of an artifact id, whether it exists or not."""
        return self.root / artifact_id.rpartition("-")[0] / artifact_id

    def scratch(self, artifact_id: str) -> Path:
        """Return the folder of an unfinished artifact's ledger and checkpoints."""
        return self.root / ".work" / artifact_id

    def lock_path(self, artifact_id: str) -> Path:
        """Return the path of an artifact's lock file."""
        return self.root / ".locks" / f"{artifact_id}.lock"

    @property
    def models(self) -> Path:
        """Folder of converted models."""
        return self.root / "models"

    def is_published(self, artifact_id: str) -> bool:
        """Say whether the artifact has a manifest."""
        return (self.folder(artifact_id) / MANIFEST_NAME).exists()

    def is_locked(self, artifact_id: str) -> bool:
        """Say whether some process is writing the artifact."""
        return is_locked(self.lock_path(artifact_id))

    def ledger(self, artifact_id: str) -> Ledger:
        """Read the ledger of an unfinished artifact; empty if there is none."""
        return Ledger(self.scratch(artifact_id) / "ledger.jsonl")

    def published_ids(self, stage: str | None = None) -> list[str]:
        """Return the ids of all published artifacts, or of one stage, oldest first."""
        manifests = self.root.glob(f"{stage or '*'}/*/{MANIFEST_NAME}")
        return [path.parent.name for path in sorted(manifests, key=lambda path: path.stat().st_mtime_ns)]

    def unfinished_ids(self) -> list[str]:
        """Return the ids of artifacts that were begun and not published."""
        return sorted(path.name for path in (self.root / ".work").glob("*") if not self.is_published(path.name))

    def find(self, name: str) -> str:
        """Return the one published id that is `name` or begins with it.

        Raises ArtifactNotFoundError with near names, or naming the candidates if several begin with it.
        """
        known = self.published_ids()
        matches = [name] if name in known else [item for item in known if item.startswith(name)]
        if len(matches) == 1:
            return matches[0]
        if matches:
            raise ArtifactNotFoundError(f"{name!r} is the beginning of {len(matches)} ids: {', '.join(matches)}.")
        if name in self.unfinished_ids():
            raise ArtifactIncompleteError(f"{name} was begun and is not finished. Run its recipe again to go on.")
        raise ArtifactNotFoundError(
            f"No artifact {name!r} in {self.root}.{near_names(name, known)} `mi-pipe status` lists all."
        )

    def remove(self, artifact_id: str) -> None:
        """Remove an artifact and its scratch space, manifest first so that no half of it passes for whole."""
        with exclusive_lock(self.lock_path(artifact_id), artifact_id):
            (self.folder(artifact_id) / MANIFEST_NAME).unlink(missing_ok=True)
            for folder in (self.folder(artifact_id), self.scratch(artifact_id)):
                shutil.rmtree(folder, ignore_errors=True)
