"""How artifacts are called in the report."""

from mi_pipe.core.artifact import Artifact


def short_name(artifact: Artifact) -> str:
    """Return the task that an artifact is about, or "" where its label says no more than its stage.

    The pipeline labels artifacts by section, or by section and task, as in `patch.ioi`.
    """
    label = artifact.manifest.label
    section, dot, task = label.partition(".")
    if dot:
        return task
    return "" if section in _SECTIONS or section == artifact.manifest.stage else label


def name_of(artifact: Artifact) -> str:
    """Return what to write over the part of a page that is about this artifact."""
    return short_name(artifact) or artifact.manifest.stage.replace("_", " ")


def sae_title(artifact: Artifact, sae: str, n_artifacts: int) -> str:
    """Return an SAE's name, with its artifact's where the report has SAEs of several artifacts."""
    return sae if n_artifacts == 1 else f"{short_name(artifact) or artifact.id} {sae}"


_SECTIONS = (
    *("model", "prompts", "harvest", "saes", "features", "lenses", "probes"),
    *("heads", "patch", "attribution", "circuits", "steering", "report"),
)
