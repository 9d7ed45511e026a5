"""What each step of a recipe would do now, and why: cached, resume or run. `run` asks the same questions."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from flows.diagram import Step
from mi_pipe.core.artifact import Artifact
from mi_pipe.core.manifest import InputRef, Manifest, read_manifest
from mi_pipe.core.stage import is_current
from mi_pipe.core.store import Store

Action = Literal["cached", "resume", "run", "wait"]
_MOST_CHANGES = 3


@dataclass(frozen=True)
class Intent:
    """What would happen to one step, and why."""

    step: Step
    action: Action
    reason: str
    n_done: int = 0
    n_total: int | None = None


def plan(steps: list[Step], store: Store) -> list[Intent]:
    """Return the intent of every step; raises ArtifactDamagedError if a published artifact is not whole."""
    intents: dict[int, Intent] = {}
    for step in steps:
        intents[id(step)] = _intent(step, store, intents)
    return [intents[id(step)] for step in steps]


def _intent(step: Step, store: Store, known: dict[int, Intent]) -> Intent:
    if store.is_published(step.id):
        artifact = Artifact(store.folder(step.id))
        reason = _waiting(step, known)
        refs = None if reason else current_refs(step, store)
        if refs is not None and is_current(artifact, refs):
            return Intent(step, "cached", artifact.id)
        return Intent(step, "run", reason or "an input was made anew and differs")
    if store.is_locked(step.id):
        return Intent(step, "wait", "another process is making it now")
    ledger = store.ledger(step.id)
    if ledger.n_done:
        total = f" of {ledger.n_total}" if ledger.n_total else ""
        return Intent(step, "resume", f"{ledger.n_done}{total} units are done", ledger.n_done, ledger.n_total)
    return Intent(step, "run", _why_new(step, store, known))


def current_refs(step: Step, store: Store) -> dict[str, InputRef] | None:
    """Return the id and digest of each input as it is now, or None if one does not exist."""
    refs = {}
    for role, source in step.sources():
        if not isinstance(source, Step):
            refs[role] = InputRef(id=source.id, digest=source.digest)
        elif store.is_published(source.id):
            refs[role] = InputRef(id=source.id, digest=read_manifest(store.folder(source.id)).digest)
        else:
            return None
    return refs


def _waiting(step: Step, known: dict[int, Intent]) -> str:
    names = [source.label for source in step.upstream if known[id(source)].action != "cached"]
    return f"after {', '.join(names)}" if names else ""


def _why_new(step: Step, store: Store, known: dict[int, Intent]) -> str:
    """Compare with the latest artifact of the same stage and label."""
    before = _latest(step, store)
    if before is None:
        return "never made"
    changes = _config_changes(before.config, step.config.identity()) + _input_changes(before, step)
    if before.stage_version != step.stage.version:
        changes.append(f"stage version {before.stage_version} -> {step.stage.version}")
    more = f" and {len(changes) - _MOST_CHANGES} more" if len(changes) > _MOST_CHANGES else ""
    return ", ".join(changes[:_MOST_CHANGES]) + more or _waiting(step, known) or "never made"


def _input_changes(before: Manifest, step: Step) -> list[str]:
    ids = {role: source.id for role, source in step.sources()}
    labels = {role: source.label for role, source in step.sources() if isinstance(source, Step)}
    changes = []
    for role in sorted({*ids, *before.inputs}):
        if role not in before.inputs:
            changes.append(f"input {labels.get(role, role)} is new")
        elif role not in ids:
            changes.append(f"input {role} is gone")
        elif before.inputs[role].id != ids[role]:
            changes.append(f"input {labels.get(role, role)} changed")
    return changes


def _latest(step: Step, store: Store) -> Manifest | None:
    for artifact_id in reversed(store.published_ids(step.stage.name)):
        manifest = read_manifest(store.folder(artifact_id))
        if manifest.label == step.label:
            return manifest
    return None


def _config_changes(before: Any, now: Any, path: str = "") -> list[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        keys = sorted({*before, *now})
        return [
            change
            for key in keys
            for change in _config_changes(before.get(key), now.get(key), f"{path}.{key}" if path else str(key))
        ]
    limit = 24
    return [] if before == now else [f"{path} {str(before)[:limit]} -> {str(now)[:limit]}"]


def as_row(intent: Intent) -> dict[str, Any]:
    """Return an intent as a row for tables and JSON."""
    row = {item.name: getattr(intent, item.name) for item in dataclasses.fields(intent) if item.name != "step"}
    return {"step": intent.step.label, "id": intent.step.id, **row}
