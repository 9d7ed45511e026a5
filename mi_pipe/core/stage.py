"""A stage and how one is run: skipped if its result exists, continued if it was begun, published at the end.

A stage is a function (config, inputs, workspace) -> main figures. Everything around it happens here once:
the id, the lock, the disk check, the ledger's clock, the manifest.
"""

import dataclasses
import logging
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Literal, Protocol, TypeVar, runtime_checkable

from mi_pipe.core.artifact import Artifact
from mi_pipe.core.atomic import write_bytes
from mi_pipe.core.config import Config
from mi_pipe.core.errors import DiskSpaceError
from mi_pipe.core.full_disk import told_if_full
from mi_pipe.core.lock import exclusive_lock
from mi_pipe.core.manifest import MANIFEST_NAME, InputRef, MadeOf, Scalar, Sources, artifact_id
from mi_pipe.core.pool import Pool
from mi_pipe.core.progress import Progress
from mi_pipe.core.store import Store
from mi_pipe.core.workspace import Workspace

_log = logging.getLogger(__name__)
Outcome = Literal["Cached", "Resumed", "Completed"]
DISK_MARGIN = 1.05
"""How much more than its estimate a stage has to find free."""


@runtime_checkable
class Identified(Protocol):
    """Anything that can be an input: an artifact or a model."""

    @property
    def id(self) -> str:
        """What it is called."""
        ...

    @property
    def digest(self) -> str:
        """Hash of its content."""
        ...


@runtime_checkable
class Sourced(Protocol):
    """An input that may lie outside the store and says how it was found there."""

    @property
    def source(self) -> dict[str, Scalar]:
        """What finds it again; empty if it lies in the store alone."""
        ...


@dataclass(frozen=True)
class Estimate:
    """What a stage expects to write and do, before it starts."""

    size_bytes: int
    n_units: int
    unit: str
    notes: tuple[str, ...] = ()
    """What the user should know of it; logged when the work begins."""


ConfigT = TypeVar("ConfigT", bound=Config)
InputsT = TypeVar("InputsT")


@dataclass(frozen=True)
class Stage(Generic[ConfigT, InputsT]):
    """A batch step. `inputs` is a frozen dataclass of `Identified` values, lists of them, or None."""

    name: str
    version: int
    config: type[ConfigT]
    inputs: type[InputsT]
    run: Callable[[ConfigT, InputsT, Workspace], dict[str, Scalar]]
    estimate: Callable[[ConfigT, InputsT], Estimate]


@dataclass(frozen=True)
class Result:
    """A published artifact and how it came: Cached (existed), Resumed (continued) or Completed (new)."""

    artifact: Artifact
    outcome: Outcome
    seconds: float = field(compare=False)


def input_refs(inputs: Any) -> dict[str, InputRef]:
    """Return the id and digest of each input by role; items of a list have roles `saes.0`, `saes.1` and so on."""
    return {role: InputRef(id=value.id, digest=value.digest) for role, value in _by_role(inputs)}


def input_sources(inputs: Any) -> Sources:
    """Return how the inputs that lie outside the store were found, by role."""
    return {role: value.source for role, value in _by_role(inputs) if isinstance(value, Sourced) and value.source}


def _by_role(inputs: Any) -> Iterator[tuple[str, Identified]]:
    for item in dataclasses.fields(inputs):
        value = getattr(inputs, item.name)
        if isinstance(value, list | tuple):
            yield from ((f"{item.name}.{i}", entry) for i, entry in enumerate(value))
        elif value is not None:
            yield item.name, value


def stage_id(stage: Stage[Any, Any], config: Config, input_ids: dict[str, str]) -> str:
    """Return the id of the artifact that `stage` makes of this config and these inputs."""
    return artifact_id(stage.name, stage.version, config.identity(), input_ids)


def is_current(artifact: Artifact, inputs: dict[str, InputRef]) -> bool:
    """Say whether an artifact was made from inputs with just these digests."""
    return artifact.inputs == inputs


def execute(
    stage: Stage[ConfigT, InputsT],
    config: ConfigT,
    inputs: InputsT,
    store: Store,
    progress: Progress | None = None,
    label: str = "",
    wait: bool = False,
    pool: Pool | None = None,
) -> Result:
    """Return the stage's artifact, made now unless it exists; workers of `pool` share the work where it can be.

    Raises ArtifactLockedError if another process is making it (or waits, if `wait`), ArtifactDamagedError
    if it exists and is not whole, DiskSpaceError if the estimate does not fit or the disk is full after all, and what
    the stage raises.
    """
    started = time.monotonic()
    refs = input_refs(inputs)
    name = stage_id(stage, config, {role: ref.id for role, ref in refs.items()})
    if (found := _published(store, name, refs)) is not None:
        return Result(found, "Cached", time.monotonic() - started)
    with exclusive_lock(store.lock_path(name), name, wait):
        if (found := _published(store, name, refs)) is not None:
            return Result(found, "Cached", time.monotonic() - started)
        _drop_stale(store, name)
        estimate = stage.estimate(config, inputs)
        check_disk(store.root, estimate, name)
        for note in estimate.notes:
            _log.warning("%s: %s", label or name, note)
        sources = input_sources(inputs)
        made_of = MadeOf(stage.name, stage.version, config.identity(), refs, label, _execution(config), sources)
        with told_if_full(store.root, name):
            work = Workspace(name, store.folder(name), store.scratch(name), progress, pool)
            work.begin(made_of)
            try:
                summary = stage.run(config, inputs, work)
            except BaseException:
                work.pause()
                raise
            manifest = work.publish(made_of, summary)
            write_bytes(store.manifest_copy(name), manifest.to_json())
        outcome: Outcome = "Resumed" if work.is_resumed else "Completed"
        return Result(Artifact(store.folder(name)), outcome, time.monotonic() - started)


def free_bytes(root: Path) -> int:
    """Return the free space of the disk that `root` lies on, or will lie on once it is made."""
    existing = next(folder for folder in (root, *root.parents) if folder.exists())
    return shutil.disk_usage(existing).free


def check_disk(root: Path, estimate: Estimate, name: str) -> None:
    """Raise DiskSpaceError if the estimate does not fit on the store's disk."""
    free, needed = free_bytes(root), int(estimate.size_bytes * DISK_MARGIN)
    if needed > free:
        raise DiskSpaceError(
            f"{name} needs {needed / 1e9:.2f} GB in {root} and {free / 1e9:.2f} GB are free. "
            "Free space, choose another store (MI_PIPE_STORE), or ask for less (fewer tokens or hook points)."
        )


def _published(store: Store, name: str, refs: dict[str, InputRef]) -> Artifact | None:
    if not store.is_published(name):
        return None
    artifact = Artifact(store.folder(name))
    return artifact if is_current(artifact, refs) else None


def _drop_stale(store: Store, name: str) -> None:
    """Remove an artifact made from inputs that have since been made anew with other bytes."""
    if store.is_published(name):
        (store.folder(name) / MANIFEST_NAME).unlink()
        shutil.rmtree(store.folder(name))


def _execution(config: Config) -> dict[str, Any]:
    identity = config.identity()
    dumped = config.model_dump(mode="json")
    return {key: value for key, value in dumped.items() if key not in identity}
