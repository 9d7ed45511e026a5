"""From a manifest back to what made the artifact: its stage, config and inputs, or one sentence why that cannot be had.

What is found is proven: the id of stage, config and inputs has to be the artifact's id, and each input has to have the
digest that the manifest names.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, get_origin, get_type_hints

from pydantic import TypeAdapter, ValidationError

from mi_pipe.activations.harvest import capture
from mi_pipe.core.errors import MiPipeError, StageError
from mi_pipe.core.manifest import InputRef, Manifest
from mi_pipe.core.stage import Stage, input_refs, stage_id
from mi_pipe.core.store import Store
from mi_pipe.models.handle import resolve_model
from mi_pipe.opening import open_artifact
from stages import (
    attribute,
    circuits,
    generate_prompts,
    harvest,
    heads,
    import_activations,
    import_saes,
    lenses,
    patch,
    probes,
    report,
    score_features,
    train_model,
    train_saes,
)

_MODULES = (
    *(train_model, harvest, import_activations, train_saes, import_saes),
    *(score_features, heads, lenses, probes, patch, attribute, circuits, report),
)
_STAGES: dict[str, tuple[Stage[Any, Any], Any]] = {
    **{module.STAGE.name: (module.STAGE, module.STAGE.config) for module in _MODULES},
    generate_prompts.STAGE.name: (generate_prompts.STAGE, generate_prompts.AnyPromptConfig),
}


@dataclass(frozen=True)
class Made:
    """What an artifact was made by."""

    stage: Stage[Any, Any]
    config: Any
    inputs: Any
    label: str


def made_by(manifest: Manifest, store: Store, model: str | None = None) -> Made:
    """Return what made an artifact of `store`; `model` says where its model lies now.

    Raises StageError if the manifest does not suffice, ModelError and others if an input cannot be opened.
    """
    if manifest.stage == capture.STAGE.name:
        raise StageError(
            f"{manifest.id} cannot be made again from its manifest, since a capture is of a module that only a program "
            f"has. Remove it with `mi-pipe rm {manifest.id}` and call `capture` again: it will have the same id."
        )
    if manifest.stage not in _STAGES:
        raise _cannot(manifest, f"stage {manifest.stage!r} is not one that runs by itself")
    stage, kind = _STAGES[manifest.stage]
    if stage.version != manifest.stage_version:
        raise _cannot(
            manifest, f"it was made by version {manifest.stage_version} of its stage; this is {stage.version}"
        )
    config = _config(manifest, kind)
    if stage_id(stage, config, {role: ref.id for role, ref in manifest.inputs.items()}) != manifest.id:
        raise _cannot(manifest, "what its manifest says of its config is not all")
    inputs = stage.inputs(**_inputs(stage, manifest, store, model))
    for role, ref in input_refs(inputs).items():
        if manifest.inputs.get(role) != ref:
            raise _cannot(manifest, f"its input {role} ({ref.id}) is not what it was")
    return Made(stage, config, inputs, manifest.label)


def _cannot(manifest: Manifest, why: str) -> StageError:
    return StageError(
        f"{manifest.id} cannot be made again from its manifest: {why}. "
        f"Remove it with `mi-pipe rm {manifest.id}` and run its recipe again."
    )


def _config(manifest: Manifest, kind: Any) -> Any:
    """Return the config; what a manifest has beyond its fields (such as digests of files) is left out."""
    content: dict[str, Any] = {**manifest.config, **manifest.execution}
    adapter: TypeAdapter[Any] = TypeAdapter(kind)
    try:
        return adapter.validate_python(_without_extra(adapter, content))
    except (ValidationError, MiPipeError) as error:
        reason = error if isinstance(error, MiPipeError) else "what it was made of is not all in its config"
        raise _cannot(manifest, str(reason).rstrip(".")) from error


def _without_extra(adapter: TypeAdapter[Any], content: dict[str, Any]) -> dict[str, Any]:
    try:
        adapter.validate_python(content)
    except ValidationError as error:
        extra = {item["loc"][-1] for item in error.errors() if item["type"] == "extra_forbidden"}
        return {key: value for key, value in content.items() if key not in extra}
    return content


def _inputs(stage: Stage[Any, Any], manifest: Manifest, store: Store, model: str | None) -> dict[str, Any]:
    found: dict[str, Any] = {}
    kinds = get_type_hints(stage.inputs)
    for item in dataclasses.fields(stage.inputs):
        many = [role for role in manifest.inputs if role.startswith(f"{item.name}.")]
        if item.name in manifest.inputs:
            found[item.name] = _opened(manifest, item.name, store, model)
        elif many:
            ordered = [f"{item.name}.{i}" for i in range(len(many))]
            found[item.name] = [_opened(manifest, role, store, model) for role in ordered]
        else:
            found[item.name] = [] if get_origin(kinds[item.name]) is list else None
    return found


def _opened(manifest: Manifest, role: str, store: Store, model: str | None) -> Any:
    ref = manifest.inputs[role]
    if ref.id.startswith("model-"):
        return _model(manifest, role, ref, store, model)
    url = manifest.sources.get(role, {}).get("url")
    if not store.is_published(ref.id) and url is not None:
        return open_artifact(str(url), store)
    if not store.is_published(ref.id):
        raise _cannot(manifest, f"its input {role} ({ref.id}) is not in {store.root}")
    return open_artifact(ref.id, store)


def _model(manifest: Manifest, role: str, ref: InputRef, store: Store, model: str | None) -> Any:
    source: dict[str, Any] = {**manifest.sources.get(role, {}), **({"name": model} if model else {})}
    if "name" not in source:
        raise StageError(
            f"The manifest of {manifest.id} does not say where its model {ref.id} lies: give it with --model."
        )
    handle = resolve_model(store=store, device=str(manifest.execution.get("device", "auto")), **source)
    if handle.id != ref.id:
        raise StageError(
            f"{source['name']} is {handle.id} now, and {manifest.id} was made of {ref.id}. "
            "Say with --model where that one lies."
        )
    return handle
