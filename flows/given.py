"""What a recipe starts from that is there already: activations instead of a harvest, a second store, a training.

Activations are checked against the recipe's model as far as it is known of which one they are.
"""

from dataclasses import dataclass
from typing import Any

from mi_pipe.activations.provenance import model_id, prompts_id
from mi_pipe.activations.store import ActivationStore
from mi_pipe.core.artifact import Artifact
from mi_pipe.core.errors import ConfigError, ModelError
from mi_pipe.core.store import Store
from mi_pipe.models.handle import resolve_model
from mi_pipe.models.source import ModelSource
from mi_pipe.models.trained import TrainedModel
from mi_pipe.opening import open_artifact
from mi_pipe.probes.probe_set import ProbeSet
from mi_pipe.prompts.prompt_set import PromptSet
from mi_pipe.saes.sae_set import SAESet
from stages import train_saes

_LABELS = {"other": "other_store", "start": "start_from", "saes": "trained_saes", "probes": "steering.probes"}
"""Roles by the names that recipes have for them."""


@dataclass(frozen=True)
class Given:
    """An artifact that steps read and none makes, and the role in which they read it."""

    role: str
    artifact: Artifact


def given_activations(name: str, store: Store, model: str | None, key: str = "activations") -> ActivationStore:
    """Open the activations that a recipe names under `key`; `model` is the id of the model that they must be of.

    Raises ConfigError if they hold no activations or are of another model, and what `mi_pipe.open` raises.
    """
    acts = open_artifact(name, store)
    if not isinstance(acts, ActivationStore):
        raise ConfigError(f"{key}: {acts.id} holds no activations; name a harvest, an import or a capture.")
    known = model_id(acts)
    if model is not None and known is not None and known != model:
        raise ConfigError(
            f"activations: {acts.id} is of the model {known}, and the recipe's model is {model} (name, dtype and "
            "revision count). Name that model, or none: then only what needs no model is measured."
        )
    return acts


def known_prompts(acts: ActivationStore, store: Store) -> PromptSet | None:
    """Return the prompts of which the rows are, if the store has them."""
    name = prompts_id(acts)
    return PromptSet(store.folder(name)) if name is not None and store.is_published(name) else None


def known_model(acts: ActivationStore, store: Store) -> ModelSource | None:
    """Return the model of which the rows are, if it is known and still where it was."""
    name = model_id(acts)
    if name is not None and store.is_published(name):
        return TrainedModel(store.folder(name))
    source: dict[str, Any] = dict(acts.manifest.sources.get("model", {}))
    if name is None or "name" not in source:
        return None
    try:
        handle = resolve_model(store=store, **source)
    except ModelError:
        return None
    return handle if handle.id == name else None


def given_training(name: str, store: Store) -> SAESet:
    """Open the finished training that a recipe goes on from; raises ConfigError if it is none."""
    found = open_artifact(name, store)
    if not isinstance(found, SAESet) or found.manifest.stage != train_saes.STAGE.name:
        raise ConfigError(f"saes.start_from: {found.id} is no training of SAEs; name the artifact of a saes section.")
    return found


def given_saes(name: str, store: Store) -> SAESet:
    """Open SAEs that are there; raises ConfigError if the artifact holds none, and what `mi_pipe.open` raises."""
    found = open_artifact(name, store)
    if not isinstance(found, SAESet):
        raise ConfigError(f"trained_saes: {found.id} holds no SAEs; name a training or an import of SAEs.")
    return found


def given_probes(name: str, store: Store) -> ProbeSet:
    """Open probes that are there; raises ConfigError if the artifact holds none, and what `mi_pipe.open` raises."""
    found = open_artifact(name, store)
    if not isinstance(found, ProbeSet):
        raise ConfigError(f"steering.probes: {found.id} holds no probes; name the artifact of a probes section.")
    return found


def as_row(given: Given) -> dict[str, Any]:
    """Return what is given as a row for tables and JSON, like those of `flows.planning`."""
    found = given.artifact
    text = "those of the activations"
    if isinstance(found, ActivationStore):
        text = _extent(found)
    elif isinstance(found, SAESet):
        text = f"{len(found)} SAE{'s' if len(found) != 1 else ''}"
        if given.role == "start":
            text = f"a training of {text}, to go on from"
    elif isinstance(found, ProbeSet):
        text = f"probes of {', '.join(found.labels)}"
    label = _LABELS.get(given.role, given.role)
    return {"step": label, "id": found.id, "action": "given", "reason": text, "n_done": 0, "n_total": None}


def _extent(acts: ActivationStore) -> str:
    n_hooks = len(acts.hooks)
    points = f"{n_hooks} hook point{'s' if n_hooks != 1 else ''}"
    return f"{acts.n_rows:,} rows of {acts.n_prompts:,} prompts at {points}, {acts.dtype}"
