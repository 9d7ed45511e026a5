"""Activations that a recipe starts from instead of a harvest, and the prompts of which they are, if the store has them.

They are checked against the recipe's model as far as it is known of which one they are.
"""

from typing import Any

from mi_pipe.activations.provenance import model_id, prompts_id
from mi_pipe.activations.store import ActivationStore
from mi_pipe.core.artifact import Artifact
from mi_pipe.core.errors import ConfigError, ModelError
from mi_pipe.core.store import Store
from mi_pipe.models.handle import resolve_model
from mi_pipe.models.hook_points import HookMap
from mi_pipe.models.source import ModelSource
from mi_pipe.models.trained import TrainedModel
from mi_pipe.opening import open_artifact
from mi_pipe.prompts.prompt_set import PromptSet
from mi_pipe.saes.config import TrainSAEsConfig
from stages.train_saes import plan_sweep


def given_activations(name: str, store: Store, model: str | None) -> ActivationStore:
    """Open the activations that a recipe names; `model` is the id of the recipe's model.

    Raises ConfigError if they hold no activations or are of another model, and what `mi_pipe.open` raises.
    """
    acts = open_artifact(name, store)
    if not isinstance(acts, ActivationStore):
        raise ConfigError(f"activations: {acts.id} holds no activations; name a harvest, an import or a capture.")
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


def check_given(acts: ActivationStore, asked: TrainSAEsConfig, hooks: HookMap | None) -> None:
    """Raise HookPointError or ConfigError for hook points that the store, or the recipe's model, does not have so."""
    for hook in dict.fromkeys(hook for spec in plan_sweep(asked, acts) for hook in spec.sites.hooks):
        if hooks is not None and hooks[hook].width != acts.width(hook):
            raise ConfigError(
                f"activations: {hook} is {acts.width(hook)} values wide in {acts.id}, and {hooks[hook].width} in the "
                "recipe's model. Name the model of the activations, or none."
            )


def as_row(given: Artifact) -> dict[str, Any]:
    """Return what is given as a row for tables and JSON, like those of `flows.planning`."""
    is_store = isinstance(given, ActivationStore)
    label, text = ("activations", _extent(given)) if is_store else ("prompts", "those of the activations")
    return {"step": label, "id": given.id, "action": "given", "reason": text, "n_done": 0, "n_total": None}


def _extent(acts: ActivationStore) -> str:
    n_hooks = len(acts.hooks)
    points = f"{n_hooks} hook point{'s' if n_hooks != 1 else ''}"
    return f"{acts.n_rows:,} rows of {acts.n_prompts:,} prompts at {points}, {acts.dtype}"
