"""Where an exported SAE comes from, as far as the store knows: notes that go into another program's config."""

from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

import mi_pipe
from mi_pipe.activations.provenance import prompts_id
from mi_pipe.activations.store import PROMPTS_FILE, ActivationStore
from mi_pipe.core.artifact import Artifact
from mi_pipe.core.manifest import InputRef
from mi_pipe.core.store import Store
from mi_pipe.saes.sae import SAE
from mi_pipe.saes.sae_set import SAESet


@dataclass(frozen=True)
class Origin:
    """Notes on a set of SAEs; None and "" are what is not known."""

    artifact: str
    digest: str
    model: str = ""
    """The model's name."""
    context_size: int | None = None
    """Tokens of the longest prompt, BOS counted."""
    prepend_bos: bool | None = None
    matryoshka_fractions: tuple[float, ...] = ()

    def note(self, sae: SAE) -> dict[str, Any]:
        """Return what says which SAE of which artifact this is."""
        return {
            "mi_pipe_version": mi_pipe.__version__,
            "artifact": self.artifact,
            "digest": self.digest,
            "sae": sae.name,
            "architecture": sae.architecture,
        }

    def model_name(self, sae: SAE) -> str:
        """Return the name of the model whose activations an SAE reads, or what else is known of it."""
        return self.model or sae.model


def origin_of(saes: SAESet, store: Store) -> Origin:
    """Return what the manifests say of the model, and what the store has of the prompts."""
    acts = _opened(saes.inputs.get("activations"), store)
    fractions = saes.config.get("matryoshka_fractions") or ()
    known = Origin(saes.id, saes.digest, _model_name(saes, acts), matryoshka_fractions=tuple(map(float, fractions)))
    if not isinstance(acts, ActivationStore):
        return known
    lengths = acts.read_table(PROMPTS_FILE, ["n_tokens"])["n_tokens"].to_numpy()
    prompts = prompts_id(acts)
    asked = Artifact(store.folder(prompts)).config if prompts is not None and store.is_published(prompts) else {}
    return Origin(
        known.artifact,
        known.digest,
        known.model,
        context_size=int(lengths.max()),
        prepend_bos=asked.get("prepend_bos"),
        matryoshka_fractions=known.matryoshka_fractions,
    )


def _opened(ref: InputRef | None, store: Store) -> Artifact | None:
    from mi_pipe.opening import open_artifact

    return open_artifact(ref.id, store) if ref is not None and store.is_published(ref.id) else None


def _model_name(saes: SAESet, acts: Artifact | None) -> str:
    """Return the name by which the model was found; of a path on the disk only the last part is of use to others."""
    for manifest in [saes.manifest, *([acts.manifest] if acts else [])]:
        name = str(manifest.sources.get("model", {}).get("name") or "")
        if name:
            return PurePath(name).name if PurePath(name).is_absolute() else name
    return ""
