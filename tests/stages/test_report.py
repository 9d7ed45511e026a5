import json
import os
import signal
import subprocess
import sys

import pytest
from pydantic import ValidationError

from mi_pipe.core.stage import execute
from mi_pipe.core.store import Store
from mi_pipe.opening import open_artifact
from mi_pipe.report.claims import Claim
from mi_pipe.report.site import Report
from stages.report import STAGE, Inputs, ReportConfig
from tests.report.samples import HOSTILE, sample_activations, sample_artifacts
from tests.report.test_pages import Elements

CLAIMS = (
    Claim(statement=HOSTILE, stage="heads", metric="induction_score", comparison=">", value=0.5, source=HOSTILE),
    Claim(statement="no", stage="heads", metric="induction_score", comparison="<", value=0.5),
    Claim(statement="absent", stage="heads", metric=HOSTILE, comparison="==", value=HOSTILE),
)


def config(**changes) -> ReportConfig:
    fields = {"title": HOSTILE, "n_features": 55, "n_prompts": 2}
    return ReportConfig(**{**fields, **changes}).for_run(HOSTILE, HOSTILE, {"name": HOSTILE}, CLAIMS)


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory):
    store = Store(tmp_path_factory.mktemp("samples"))
    return [*sample_artifacts(store), sample_activations(store)]


@pytest.fixture(scope="module")
def report(artifacts, tmp_path_factory):
    result = execute(STAGE, config(), Inputs(artifacts), Store(tmp_path_factory.mktemp("report")))
    return open_artifact(result.artifact.path)


def test_every_page_figure_and_claim_is_counted(report):
    assert isinstance(report, Report)
    assert len(report.pages) == report.summary["n_pages"] == 10
    assert report.pages[0] == "index.html"
    assert report.index.exists()
    listed = [figure for page in report.read_json("report.json")["pages"] for figure in page["figures"]]
    assert len(listed) == report.summary["n_figures"]
    assert (report.summary["n_claims"], report.summary["n_claims_held"]) == (3, 1)
    assert report.claims["holds"].tolist() == [True, False, False]


def test_every_figure_is_there_as_svg_png_and_csv(report):
    for page in report.read_json("report.json")["pages"]:
        for figure in page["figures"]:
            assert all(report.file(figure[kind]).stat().st_size > 0 for kind in ("svg", "png", "csv"))
            assert figure["alt"]


def test_text_from_models_and_recipes_never_becomes_markup(report):
    for name in report.pages:
        text = report.file(name).read_text(encoding="utf-8")
        parsed = Elements()
        parsed.feed(text)
        images = [attributes for tag, attributes in parsed.tags if tag == "img"]
        assert all(attributes["src"].startswith("figures/") and attributes["alt"] for attributes in images)
        assert not any(key.startswith("on") for _, attributes in parsed.tags for key in attributes)
        assert HOSTILE not in text
        assert HOSTILE in "".join(parsed.text)


def test_pages_name_only_files_of_the_report_and_nothing_outside(report):
    for name in report.pages:
        parsed = Elements()
        parsed.feed(report.file(name).read_text(encoding="utf-8"))
        named = [
            attributes[key]
            for _, attributes in parsed.tags
            for key in ("src", "href")
            if key in attributes and not attributes[key].startswith(("#", "data:"))
        ]
        assert named
        assert all(target.partition("#")[0] in report.manifest.files for target in named)


def test_data_scripts_hold_no_markup(report):
    scripts = [name for name in report.manifest.files if name.startswith("data/") and name.endswith(".js")]
    assert len(scripts) > 5
    for name in scripts:
        text = report.file(name).read_text(encoding="utf-8")
        assert not set("<>&\u2028\u2029") & set(text)
        key = json.loads(text[len("miPipe.receive(") :].split(",{")[0].split(",[")[0])
        assert name == f"data/{key}.js"


def test_only_the_overview_is_volatile(report):
    volatile = {name for name, entry in report.manifest.files.items() if entry.volatile}
    assert {"index.html", "report.json"} <= volatile
    assert all(name in ("index.html", "report.json") or "/index/" in name for name in volatile)


def test_a_report_that_is_killed_and_made_again_is_that_of_an_uninterrupted_run(report, tmp_path):
    """The second process dies after some pages; this one makes the others."""
    store = tmp_path / "store"
    line = [sys.executable, "-m", "tests.stages.test_report", str(store), "4"]
    done = subprocess.run(line, check=False, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == -signal.SIGKILL
    artifacts = [*sample_artifacts(Store(tmp_path / "again")), sample_activations(Store(tmp_path / "again"))]
    assert [item.digest for item in artifacts] == [ref.digest for ref in report.inputs.values()]
    result = execute(STAGE, config(), Inputs(artifacts), Store(store))
    assert result.outcome == "Resumed"
    assert result.artifact.id == report.id
    assert result.artifact.digest == report.digest
    assert result.artifact.summary == report.summary


def test_a_report_of_nothing_has_its_first_page(store):
    result = execute(STAGE, ReportConfig(), Inputs([]), store)
    assert result.artifact.summary == {"n_pages": 1, "n_figures": 0, "n_claims": 0, "n_claims_held": 0}


def test_the_estimate_covers_what_is_written(report, artifacts):
    found = STAGE.estimate(config(), Inputs(artifacts))
    assert found.n_units == 10
    assert found.size_bytes > report.size_bytes


def test_the_recipe_fills_in_what_the_section_leaves_open():
    filled = ReportConfig(recipe_name="mine").for_run("theirs", "words", {"b": 1, "a": [2]}, CLAIMS)
    assert (filled.recipe_name, filled.description) == ("mine", "words")
    assert filled.recipe_text == "b: 1\na:\n- 2\n"
    assert filled.claims == CLAIMS
    assert ReportConfig.model_validate(filled.model_dump(mode="json")) == filled


@pytest.mark.parametrize("fields", [{"n_features": -1}, {"n_prompts": 0}, {"title": ""}, {"n_feature": 1}])
def test_wrong_fields_are_refused(fields):
    with pytest.raises(ValidationError):
        ReportConfig(**fields)


def main(root: str, n_pages: int) -> None:
    """Write a report in this process, and die without warning after `n_pages` pages."""
    from mi_pipe.core.ledger import Ledger

    samples = Store(f"{root}-samples")
    artifacts = [*sample_artifacts(samples), sample_activations(samples)]
    mark = Ledger.mark

    def mark_and_die(ledger, unit, **info):
        mark(ledger, unit, **info)
        if ledger.n_done >= n_pages and ledger.n_total:
            os.kill(os.getpid(), signal.SIGKILL)

    Ledger.mark = mark_and_die
    execute(STAGE, config(), Inputs(artifacts), Store(root))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
