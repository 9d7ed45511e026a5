"""The first page: what was run, what came out, which claims hold, and how long and how large everything was."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from mi_pipe.core.artifact import Artifact
from mi_pipe.report.claims import Verdict
from mi_pipe.report.figures import Figure, bars
from mi_pipe.report.lineage import lineage
from mi_pipe.report.naming import short_name
from mi_pipe.report.page import Page

STAGE_PAGES = {
    "train_model": "model",
    "generate_prompts": "prompts",
    "harvest": "activations",
    "import_activations": "activations",
    "capture": "activations",
    "train_saes": "saes",
    "import_saes": "saes",
    "score_features": "features",
    "lenses": "lenses",
    "probes": "probes",
    "heads": "heads",
    "patch": "patching",
    "attribute": "attribution",
    "circuits": "circuit",
    "steer": "steering",
}
"""Stages in the order of the pipeline, and the page that shows each."""


@dataclass(frozen=True)
class Recipe:
    """What was asked for: a name, a sentence or two, and the YAML it was asked with."""

    name: str
    description: str
    text: str


def page(artifacts: Sequence[Artifact], verdicts: Sequence[Verdict], recipe: Recipe) -> Page:
    """Make the overview; it shows times, so its files differ between equal runs."""
    return Page(
        context={
            "recipe": recipe,
            "verdicts": verdicts,
            "n_held": sum(verdict.holds for verdict in verdicts),
            "results": [_card(artifact) for artifact in artifacts],
            "models": _models(artifacts),
            "total_s": sum(artifact.manifest.elapsed_s for artifact in artifacts),
            "total_bytes": sum(artifact.size_bytes for artifact in artifacts),
            "lineage": lineage(artifacts),
            "hosts": _distinct([artifact.manifest.host for artifact in artifacts]),
            "versions": _distinct([artifact.manifest.versions for artifact in artifacts]),
        },
        figures=[_times(artifacts)] if artifacts else [],
        tables={"artifacts": _table(artifacts), "claims": claims_table(verdicts)},
    )


def covers(artifacts: Sequence[Artifact], figures: dict[str, list[dict[str, str]]]) -> dict[str, dict[str, str]]:
    """Return the figure that stands for each artifact: its own first one, else the first of its stage's page."""
    found: dict[str, dict[str, str]] = {}
    for artifact in artifacts:
        drawn = figures.get(STAGE_PAGES.get(artifact.manifest.stage, ""), [])
        own = [figure for figure in drawn if figure["name"].endswith(artifact.id)]
        if drawn:
            found[artifact.id] = (own or drawn)[0]
    return found


def in_pipeline_order(artifacts: Sequence[Artifact]) -> list[Artifact]:
    """Return artifacts in the order of the stages; those of one stage keep theirs, unknown stages come last."""
    order = list(STAGE_PAGES)
    return sorted(
        artifacts, key=lambda item: order.index(item.manifest.stage) if item.manifest.stage in order else len(order)
    )


def claims_table(verdicts: Sequence[Verdict]) -> pd.DataFrame:
    """Return claims, measured values and verdicts as a table."""
    return pd.DataFrame(
        [
            {**verdict.claim.model_dump(mode="json"), "measured": verdict.measured, "holds": verdict.holds}
            | {"artifact": verdict.artifact_id, "reason": verdict.reason}
            for verdict in verdicts
        ]
    )


def _card(artifact: Artifact) -> dict[str, Any]:
    manifest = artifact.manifest
    return {
        "id": artifact.id,
        "stage": manifest.stage,
        "label": short_name(artifact),
        "page": STAGE_PAGES.get(manifest.stage, ""),
        "summary": artifact.summary,
        "elapsed_s": manifest.elapsed_s,
        "size_bytes": artifact.size_bytes,
        "created_at": manifest.created_at,
        "n_launches": manifest.n_launches,
        "n_files": len(manifest.files),
    }


def _models(artifacts: Sequence[Artifact]) -> dict[str, str]:
    """Return id to digest of every model that was used."""
    return {
        ref.id: ref.digest for artifact in artifacts for role, ref in sorted(artifact.inputs.items()) if role == "model"
    }


def _distinct(facts: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Return each fact once; where artifacts differ, all values that occur."""
    names = dict.fromkeys(name for fact in facts for name in fact)
    return {name: ", ".join(dict.fromkeys(str(fact[name]) for fact in facts if name in fact)) for name in names}


def _table(artifacts: Sequence[Artifact]) -> pd.DataFrame:
    cards = [_card(artifact) for artifact in artifacts]
    return pd.DataFrame([{key: value for key, value in card.items() if key != "summary"} for card in cards])


def _times(artifacts: Sequence[Artifact]) -> Figure:
    frame = pd.DataFrame({
        "stage": [" ".join(filter(None, (item.manifest.stage, short_name(item)))) for item in artifacts],
        "seconds": [item.manifest.elapsed_s for item in artifacts],
    })  # fmt: skip
    slowest = frame.loc[frame["seconds"].idxmax()]
    return bars(
        "times",
        "Time of each stage",
        f"Bars of seconds for {len(frame)} artifacts; the longest is {slowest['stage']} at {slowest['seconds']:.3g} s.",
        frame,
        "stage",
        "seconds",
        x_title="seconds of work, over all launches",
    )
