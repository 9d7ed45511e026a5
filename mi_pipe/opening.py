"""`mi_pipe.open`: from an id, the beginning of one, or a path to the object that reads it; `mi_pipe.load_model`."""

import importlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

from mi_pipe.core.artifact import Artifact
from mi_pipe.core.destination import fetch_manifest
from mi_pipe.core.errors import ArtifactIncompleteError
from mi_pipe.core.manifest import MANIFEST_NAME, REQUEST_NAME, Manifest, parse_manifest, read_manifest
from mi_pipe.core.place import is_url
from mi_pipe.core.store import Store

if TYPE_CHECKING:
    from mi_pipe.models.device import DType
    from mi_pipe.models.model import Model

VIEWS = {
    "train_model": "mi_pipe.models.trained:TrainedModel",
    "generate_prompts": "mi_pipe.prompts.prompt_set:PromptSet",
    "harvest": "mi_pipe.activations.store:ActivationStore",
    "capture": "mi_pipe.activations.store:ActivationStore",
    "import_activations": "mi_pipe.activations.store:ActivationStore",
    "train_saes": "mi_pipe.saes.sae_set:SAESet",
    "import_saes": "mi_pipe.saes.sae_set:SAESet",
    "score_features": "mi_pipe.features.feature_set:FeatureSet",
    "heads": "mi_pipe.attention.head_scores:HeadScores",
    "patch": "mi_pipe.patching.effects:PatchEffects",
    "lenses": "mi_pipe.lenses.lens_readings:LensReadings",
    "probes": "mi_pipe.probes.probe_set:ProbeSet",
    "attribute": "mi_pipe.attribution.attributions:Attributions",
    "circuits": "mi_pipe.circuits.circuit_set:CircuitSet",
    "steer": "mi_pipe.steering.steering:Steering",
    "report": "mi_pipe.report.site:Report",
}


def open_artifact(
    id_or_path: str | os.PathLike[str],
    store: Store | str | os.PathLike[str] | None = None,
    partial: bool = False,
) -> Artifact:
    """Open a published artifact with the readers of its stage.

    `id_or_path` is an id, the beginning of one, an artifact's folder, or its URL in an object store (large files are
    then read from there, small ones kept in the store). Raises ArtifactNotFoundError, ArtifactIncompleteError,
    ArtifactDamagedError or PlaceError, each saying what to do.

    With `partial` an unfinished harvest is opened too, as far as its shards are there (`activations.partial`).
    """
    if is_url(text := os.fspath(id_or_path)):
        path = fetch_manifest(text, store if isinstance(store, Store) else Store(store))
    else:
        path = Path(id_or_path)
    if not (path / MANIFEST_NAME).exists():
        store = store if isinstance(store, Store) else Store(store)
        unfinished = store.find_unfinished(path.name if path.is_dir() else text)
        if unfinished is not None and partial:
            return _open_unfinished(unfinished, store)
        path = store.folder(store.find(unfinished or text))
    manifest = read_manifest(path)
    return view_of(manifest)(path, manifest)


def load_model(
    name: str, store: Store | str | os.PathLike[str] | None = None, device: str = "auto", dtype: "DType" = "float32"
) -> "Model":
    """Load a model by what a recipe calls it: one that was pulled into the store, a folder, a GGUF file, a hub name.

    Models that the pipeline trained are opened by their ids and loaded: `mi_pipe.open(id).load()`. Raises ModelError if
    there is none, or it cannot be loaded.
    """
    from mi_pipe.models.handle import resolve_model
    from mi_pipe.models.source import load_source

    return load_source(resolve_model(name, store if isinstance(store, Store) else Store(store), dtype, device))


def _open_unfinished(artifact_id: str, store: Store) -> Artifact:
    """Return what is there of an unfinished harvest; raises ArtifactIncompleteError if nothing can be read yet."""
    from mi_pipe.activations.group import plan_of_group
    from mi_pipe.activations.partial import PartialStore

    try:
        request = parse_manifest((store.scratch(artifact_id) / REQUEST_NAME).read_bytes(), artifact_id)
    except FileNotFoundError:
        request = None
    if request is None or VIEWS.get(request.stage) != VIEWS["harvest"]:
        raise ArtifactIncompleteError(store.unfinished_text(artifact_id))
    ref = request.inputs.get("prompts")
    prompts = open_artifact(ref.id, store) if ref is not None and store.is_published(ref.id) else None
    found = PartialStore(store.folder(artifact_id), request, prompts)
    if plan_of_group(found.place) is None:
        raise ArtifactIncompleteError(store.unfinished_text(artifact_id))
    return found


def view_of(manifest: Manifest) -> type[Artifact]:
    """Return the class that reads an artifact of the manifest's stage."""
    module_name, _, class_name = VIEWS.get(manifest.stage, "mi_pipe.core.artifact:Artifact").partition(":")
    return getattr(importlib.import_module(module_name), class_name)
