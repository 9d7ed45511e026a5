"""repair: makes a damaged artifact whole again, and an unfinished one finished, with the digest that it has to have.

Of a harvest just the damaged shards are computed again; of any other stage everything, apart from the artifact, of
which the damaged files are then replaced. A damaged manifest is taken from the store's copy of it. Files that do not
come out byte for byte as they were published are never taken, but for those that hold times and do not count for the
digest: these are new, and the manifest says so. A capture cannot be made again from here, since the store does not have
its module.
"""

import shutil
from dataclasses import dataclass
from typing import Literal

from mi_pipe.core.artifact import Artifact
from mi_pipe.core.atomic import sweep_temporary, write_bytes
from mi_pipe.core.damage import find_damage
from mi_pipe.core.errors import ArtifactDamagedError, ConfigError, StageError
from mi_pipe.core.full_disk import told_if_full
from mi_pipe.core.lock import exclusive_lock
from mi_pipe.core.manifest import MANIFEST_NAME, REQUEST_NAME, Manifest, parse_manifest
from mi_pipe.core.mending import Mender
from mi_pipe.core.place import is_url
from mi_pipe.core.progress import Progress
from mi_pipe.core.stage import execute
from mi_pipe.core.store import Store
from mi_pipe.core.workspace import Workspace
from mi_pipe.verifying import Verification, verify
from stages.repair.harvest import mend_harvest
from stages.repair.remaking import Made, made_by


@dataclass(frozen=True)
class Repaired:
    """What a repair did: nothing (whole), replaced files (mended), or made and published the rest (finished)."""

    id: str
    outcome: Literal["whole", "mended", "finished"]
    mended: tuple[str, ...] = ()


def repair(name: str, store: Store, progress: Progress | None = None, model: str | None = None) -> Repaired:
    """Mend an artifact of `store`, by its id or the beginning of it; `model` says where its model lies now.

    Raises StageError if it cannot be made again here with the same bytes, in which case it stays as it is;
    ArtifactLockedError, ModelError and others as the stage does.
    """
    if is_url(name):
        raise ConfigError("Repair works in the store that made an artifact, by its id, not by URL.")
    progress = progress or Progress()
    if (unfinished := store.find_unfinished(name)) is not None:
        return _finish(unfinished, store, progress, model)
    found, mended = verify(name, store, deep=True, progress=progress), list[str]()
    if found.is_whole:
        _sweep(found.id, store)
        return Repaired(found.id, "whole")
    with exclusive_lock(store.lock_path(found.id), found.id), told_if_full(store.root, found.id):
        sweep_temporary(store.folder(found.id))
        if found.manifest is None:
            _restore_manifest(found.id, store)
            mended.append(MANIFEST_NAME)
            found = verify(found.id, store, deep=True, progress=progress)
        if found.manifest is not None and not found.is_whole:
            mended += _mend(found, found.manifest, store, progress, model)
    return Repaired(found.id, "mended", tuple(mended))


def _sweep(name: str, store: Store) -> None:
    """Remove what a repair left that was killed after its last file."""
    if store.repair_folder(name).exists():
        with exclusive_lock(store.lock_path(name), name):
            shutil.rmtree(store.repair_folder(name), ignore_errors=True)


def _finish(name: str, store: Store, progress: Progress, model: str | None) -> Repaired:
    """Go on with an unfinished artifact as it was begun."""
    try:
        request = parse_manifest((store.scratch(name) / REQUEST_NAME).read_bytes(), name)
    except (FileNotFoundError, ArtifactDamagedError) as error:
        raise StageError(f"{name} is not finished, and how it was begun is not known. Run its recipe again.") from error
    made = made_by(request, store, model)
    execute(made.stage, made.config, made.inputs, store, progress, made.label)
    return Repaired(name, "finished")


def _restore_manifest(name: str, store: Store) -> None:
    """Put the store's copy of a manifest in its place."""
    try:
        copy = parse_manifest(store.manifest_copy(name).read_bytes(), name)
    except (FileNotFoundError, ArtifactDamagedError) as error:
        raise StageError(
            f"The manifest of {name} is damaged, and {store.root} has no whole copy of it. "
            f"Remove it with `mi-pipe rm {name}` and run its recipe again."
        ) from error
    write_bytes(store.folder(name) / MANIFEST_NAME, copy.to_json())


def _mend(found: Verification, manifest: Manifest, store: Store, progress: Progress, model: str | None) -> list[str]:
    """Make the damaged files again, apart from the artifact, and put them into it; return their names."""
    made = made_by(manifest, store, model)
    artifact = Artifact(store.folder(found.id), manifest)
    apart = store.repair_folder(found.id)
    work = Workspace(found.id, apart / "files", apart / "scratch", progress)
    mender = Mender(artifact, work.folder)
    damaged = [damage.file for damage in found.damage]
    if MANIFEST_NAME in damaged:
        damaged.remove(MANIFEST_NAME)
        artifact.place.write(MANIFEST_NAME, manifest.to_json())
    try:
        if made.stage.name == "harvest":
            mend_harvest(artifact, made.config, made.inputs, damaged, work, mender)
        else:
            manifest = _make_all_again(made, manifest, damaged, work, mender)
            _write_manifest(manifest, artifact, store)
    except StageError:
        shutil.rmtree(apart, ignore_errors=True)
        raise
    left = find_damage(Artifact(store.folder(found.id), manifest))
    if left:
        raise StageError(f"{found.id} is still damaged: {left[0]}. Remove it with `mi-pipe rm {found.id}`.")
    shutil.rmtree(apart)
    return mender.mended


def _make_all_again(made: Made, manifest: Manifest, damaged: list[str], work: Workspace, mender: Mender) -> Manifest:
    """Run the stage apart and take what is damaged; returns the manifest, in which new files of times are noted."""
    made.stage.run(made.config, made.inputs, work)
    mender.install(name for name in damaged if not manifest.files[name].volatile)
    renewed = mender.renew(name for name in damaged if manifest.files[name].volatile)
    return manifest.model_copy(update={"files": {**manifest.files, **renewed}})


def _write_manifest(manifest: Manifest, artifact: Artifact, store: Store) -> None:
    """Put a manifest into its place, unless it is there, and then the store's copy of it."""
    if manifest != artifact.manifest:
        artifact.place.write(MANIFEST_NAME, manifest.to_json())
        write_bytes(store.folder(manifest.id) / MANIFEST_NAME, manifest.to_json())
        write_bytes(store.manifest_copy(manifest.id), manifest.to_json())
