"""The site: which pages a list of artifacts makes, and the read side of a finished report."""

import webbrowser
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from mi_pipe.core.artifact import Artifact
from mi_pipe.report import (
    activations,
    attention,
    attribution,
    circuit,
    features,
    heads,
    lenses,
    model,
    overview,
    patching,
    probes,
    prompts,
    saes,
    steering,
)
from mi_pipe.report.claims import Verdict
from mi_pipe.report.page import Page, PagePlan

INDEX = "index.html"


class Report(Artifact):
    """A finished report: a folder of pages that opens from disk and asks nothing of the network."""

    @property
    def index(self) -> Path:
        """Path of the first page."""
        return self.file(INDEX)

    @property
    def pages(self) -> list[str]:
        """Names of the HTML files, the first page first."""
        names = sorted(name for name in self.manifest.files if name.endswith(".html") and "/" not in name)
        return sorted(names, key=lambda name: name != INDEX)

    @property
    def claims(self) -> pd.DataFrame:
        """Claims, measured values and whether each holds."""
        return pd.DataFrame(self.read_json("report.json")["claims"])

    def open(self) -> bool:
        """Show the report in the reader's browser; False if there is none."""
        return webbrowser.open(self.index.as_uri())


def page_plans(
    artifacts: Sequence[Artifact],
    verdicts: Sequence[Verdict],
    recipe: overview.Recipe,
    n_features: int,
    n_prompts: int,
) -> list[PagePlan]:
    """Return the pages that these artifacts make, in the order of the navigation.

    `n_features` dashboards an SAE in the browser; `n_prompts` prompts of each set in samples and attention viewer.
    """
    ordered = overview.in_pipeline_order(artifacts)
    makers: list[tuple[str, str, str, Callable[[Any], Page]]] = [
        ("model", "model", "Model", model.page),
        ("prompts", "prompts", "Prompts", partial(prompts.page, n_samples=n_prompts)),
        ("activations", "activations", "Activations", activations.page),
        ("saes", "saes", "SAEs", saes.page),
        ("features", "features", "Features", partial(features.page, n_features=n_features)),
        ("lenses", "lenses", "Lenses", lenses.page),
        ("probes", "probes", "Probes", probes.page),
        ("heads", "heads", "Heads", heads.page),
        ("heads", "attention", "Attention", partial(attention.page, n_prompts=n_prompts)),
        ("patching", "patching", "Patching", patching.page),
        ("attribution", "attribution", "Attribution", attribution.page),
        ("circuit", "circuit", "Circuits", circuit.page),
        ("steering", "steering", "Steering", steering.page),
    ]
    first = partial(overview.page, ordered, verdicts, recipe)
    plans = [PagePlan("index", "Overview", first, volatile=True)]
    for kind, slug, title, make in makers:
        if found := [item for item in ordered if overview.STAGE_PAGES.get(item.manifest.stage) == kind]:
            plans.append(PagePlan(slug, title, partial(make, found)))
    return plans
