"""Report: one offline folder of HTML pages from whatever artifacts there are.

The unit of resume is the page: a page whose files are all written is not made again. The overview comes last,
since it shows a figure of each other page; it alone holds times and host facts and is volatile.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml
from pydantic import Field

from mi_pipe.core.artifact import Artifact
from mi_pipe.core.config import Config
from mi_pipe.core.manifest import Scalar
from mi_pipe.core.stage import Estimate, Stage
from mi_pipe.core.workspace import Workspace
from mi_pipe.report.claims import Claim, Verdict, judge
from mi_pipe.report.overview import Recipe, covers
from mi_pipe.report.page import PagePlan
from mi_pipe.report.site import page_plans
from mi_pipe.report.writer import SiteHeader, SiteWriter

_STATIC_BYTES = 200_000
_PAGE_BYTES = 1_000_000
_DASHBOARD_BYTES = 6_000
_VIEWER_BYTES_PER_PROMPT = 8_000_000


@dataclass(frozen=True)
class Inputs:
    """What the report is made of: any artifacts of any stages, opened with their readers."""

    artifacts: list[Artifact]


class ReportConfig(Config):
    """What the report says and how much it shows."""

    title: str = Field("mi_pipe report", min_length=1)
    """Title on every page."""
    recipe_name: str = ""
    """Name of the recipe that was run."""
    description: str = ""
    """One or two sentences on what was done."""
    recipe_text: str = ""
    """The recipe as YAML, shown on the first page."""
    claims: tuple[Claim, ...] = ()
    """Statements about results, each checked against the measured value."""
    n_features: int = Field(1000, ge=0, le=100_000)
    """Features of each SAE that get a dashboard, chosen evenly over their density; the list holds all."""
    n_prompts: int = Field(6, ge=1, le=100)
    """Prompts of each set to read, and of each task in the attention viewer."""

    def for_run(
        self, recipe_name: str, description: str, recipe: Mapping[str, Any], claims: Sequence[Claim]
    ) -> "ReportConfig":
        """Return this config with what only the whole recipe knows; what is set here is kept."""
        text = yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True, width=100)
        return self.model_copy(
            update={
                "recipe_name": self.recipe_name or recipe_name,
                "description": self.description or description,
                "recipe_text": self.recipe_text or text,
                "claims": (*self.claims, *claims),
            }
        )


def estimate(config: ReportConfig, inputs: Inputs) -> Estimate:
    """Return the expected size from the number of pages, dashboards and prompts."""
    plans = _plans(config, inputs, [])
    counts = [_n_saes(artifact) for artifact in inputs.artifacts if artifact.manifest.stage == "score_features"]
    has_viewer = any(plan.slug == "attention" for plan in plans)
    size = _STATIC_BYTES + _PAGE_BYTES * len(plans) + _DASHBOARD_BYTES * config.n_features * sum(counts)
    size += _VIEWER_BYTES_PER_PROMPT * config.n_prompts * has_viewer
    return Estimate(size_bytes=size, n_units=len(plans), unit="pages")


def run(config: ReportConfig, inputs: Inputs, work: Workspace) -> dict[str, Scalar]:
    """Write the pages and return their number, the number of figures, and how many claims hold."""
    verdicts = [judge(claim, inputs.artifacts) for claim in config.claims]
    plans = _plans(config, inputs, verdicts)
    writer = SiteWriter(work, SiteHeader(config.title, config.recipe_name, plans))
    work.ledger.expect(len(plans))
    writer.write_static()
    figures: dict[str, list[dict[str, str]]] = {}
    for n_done, plan in enumerate([*plans[1:], plans[0]]):
        work.progress.update(n_done, len(plans), "pages", plan.title)
        figures[plan.slug] = _written(writer, plan, work, covers(inputs.artifacts, figures))
    work.progress.update(len(plans), len(plans), "pages")
    n_held = sum(verdict.holds for verdict in verdicts)
    work.volatile("report.json")
    work.write_json("report.json", _listing(plans, figures, verdicts))
    return {
        "n_pages": len(plans),
        "n_figures": sum(map(len, figures.values())),
        "n_claims": len(verdicts),
        "n_claims_held": n_held,
    }


def _plans(config: ReportConfig, inputs: Inputs, verdicts: list[Verdict]) -> list[PagePlan]:
    recipe = Recipe(config.recipe_name, config.description, config.recipe_text)
    return page_plans(inputs.artifacts, verdicts, recipe, config.n_features, config.n_prompts)


def _written(
    writer: SiteWriter, plan: PagePlan, work: Workspace, shown: dict[str, dict[str, str]]
) -> list[dict[str, str]]:
    """Write a page unless it is written; returns its figures. A volatile page is always made anew."""
    if plan.slug in work.ledger and not plan.volatile:
        return work.ledger.info(plan.slug)["figures"]
    found = writer.write(plan, {"covers": shown} if plan.volatile else None)
    work.ledger.mark(plan.slug, figures=found)
    return found


def _listing(
    plans: list[PagePlan], figures: dict[str, list[dict[str, str]]], verdicts: list[Verdict]
) -> dict[str, Any]:
    """Return what the report holds, for programs: pages, figures and claims."""
    return {
        "pages": [{"file": plan.file_name, "title": plan.title, "figures": figures[plan.slug]} for plan in plans],
        "claims": [
            verdict.claim.model_dump(mode="json")
            | {"measured": verdict.measured, "holds": verdict.holds}
            | {"artifact": verdict.artifact_id, "reason": verdict.reason}
            for verdict in verdicts
        ],
    }


def _n_saes(artifact: Artifact) -> int:
    return len(set(artifact.read_table("features.parquet", ["sae"])["sae"]))


STAGE = Stage(name="report", version=2, config=ReportConfig, inputs=Inputs, run=run, estimate=estimate)
