"""The store: one folder, one sub-folder a stage, one folder an artifact; no index to go stale.

<store>/<stage>/<id>/manifest.json and the artifact's files
<store>/models/<name>/             converted models
<store>/.work/<id>/                ledger and checkpoints of unfinished artifacts
<store>/.repair/<id>/              files of damaged artifacts, while they are made again
<store>/.locks/<id>.lock           one writer at a time
<store>/.manifests/<id>.json       copies of manifests
"""

import os
import shutil
from pathlib import Path

from mi_pipe.core.canonical import ID_DIGITS
from mi_pipe.core.errors import ArtifactDamagedError, ArtifactIncompleteError, ArtifactNotFoundError, near_names
from mi_pipe.core.ledger import Ledger
from mi_pipe.core.lock import exclusive_lock, is_locked
from mi_pipe.core.manifest import MANIFEST_NAME, damage_text

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

    def repair_folder(self, artifact_id: str) -> Path:
        """Return the folder in which the damaged files of an artifact are made again."""
        return self.root / ".repair" / artifact_id

    def lock_path(self, artifact_id: str) -> Path:
        """Return the path of an artifact's lock file."""
        return self.root / ".locks" / f"{artifact_id}.lock"

    def manifest_copy(self, artifact_id: str) -> Path:
        """Return the path of the copy of an artifact's manifest, from which a damaged one is mended."""
        return self.root / ".manifests" / f"{artifact_id}.json"

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

        Raises ArtifactNotFoundError with near names, or naming the candidates if several begin with it;
        ArtifactIncompleteError if it is unfinished, ArtifactDamagedError if its manifest is gone.
        """
        known = self.published_ids()
        matches = _beginning_with(name, known)
        if len(matches) == 1:
            return matches[0]
        if matches:
            raise ArtifactNotFoundError(f"{name!r} is the beginning of {len(matches)} ids: {', '.join(matches)}.")
        if self.has_lost_manifest(name):
            raise ArtifactDamagedError(damage_text(name, f"its {MANIFEST_NAME} is missing"))
        unfinished = _beginning_with(name, self.unfinished_ids())
        if len(unfinished) == 1:
            raise ArtifactIncompleteError(self.unfinished_text(unfinished[0]))
        raise ArtifactNotFoundError(
            f"No artifact {name!r} in {self.root}.{near_names(name, known)} `mi-pipe status` lists all."
        )

    def has_lost_manifest(self, artifact_id: str) -> bool:
        """Say whether files of an artifact are there that is neither published nor being made."""
        is_id = len(artifact_id.rpartition("-")[2]) == ID_DIGITS
        is_known = self.is_published(artifact_id) or self.scratch(artifact_id).exists()
        return is_id and not is_known and self.folder(artifact_id).is_dir()

    def find_unfinished(self, name: str) -> str | None:
        """Return the one unfinished id that is `name` or begins with it, if no published one does."""
        matches = _beginning_with(name, self.unfinished_ids())
        return matches[0] if len(matches) == 1 and not _beginning_with(name, self.published_ids()) else None

    def unfinished_text(self, artifact_id: str) -> str:
        """Say how far an unfinished artifact is and what goes on with it."""
        ledger = self.ledger(artifact_id)
        total = f" of {ledger.n_total:,}" if ledger.n_total else ""
        far = f"{ledger.n_done:,}{total} units are done" if ledger.n_done else "it was just begun"
        return (
            f"{artifact_id} is not finished: {far}. Run its recipe again, or `mi-pipe repair {artifact_id}`, to go on. "
            "Activations can be opened as far as they are there with mi_pipe.open(..., partial=True)."
        )

    def remove(self, artifact_id: str) -> None:
        """Remove an artifact and its scratch space, manifest first so that no half of it passes for whole."""
        with exclusive_lock(self.lock_path(artifact_id), artifact_id):
            (self.folder(artifact_id) / MANIFEST_NAME).unlink(missing_ok=True)
            self.manifest_copy(artifact_id).unlink(missing_ok=True)
            for folder in (self.folder(artifact_id), self.scratch(artifact_id), self.repair_folder(artifact_id)):
                shutil.rmtree(folder, ignore_errors=True)


def _beginning_with(name: str, known: list[str]) -> list[str]:
    return [name] if name in known else [item for item in known if item.startswith(name)]
