import json
import os
import re
import signal
import subprocess
import sys

import pytest
from pydantic import ValidationError

from mi_pipe.core.artifact import Artifact
from mi_pipe.core.stage import execute
from mi_pipe.core.store import Store
from mi_pipe.opening import open_artifact
from mi_pipe.report.site import Report
from stages.report import STAGE, Inputs, ReportConfig
from tests.report.samples import CLAIMS, HOSTILE, sample_artifacts, sample_config, sample_report
from tests.report.test_pages import Elements


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    return sample_report(tmp_path_factory.getbasetemp() / "sample_report")


def test_every_page_figure_and_claim_is_counted(report):
    assert isinstance(open_artifact(report.path), Report)
    assert len(report.pages) == report.summary["n_pages"] == 14
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


def test_each_artifact_of_the_overview_shows_its_own_figure(report):
    cards = report.file("index.html").read_text(encoding="utf-8").split('<li class="card">')[1:]
    shown = 0
    for card in cards:
        artifact = re.search(r'class="id">([^<]+)<', card)[1]
        for cover in re.findall(r'class="cover" src="([^"]+)"', card):
            named = re.search(r"[a-z_]+-[0-9a-f]{16}(?=\.svg)", cover)
            assert named is None or named[0].endswith(artifact), (artifact, cover)
            shown += 1
    assert shown > 3


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


def sources(report) -> list[Artifact]:
    """Return the artifacts that the sample report was made of."""
    store = Store(report.path.parents[2] / "samples")
    return [open_artifact(store.folder(ref.id)) for ref in report.inputs.values()]


def some_artifacts(root) -> list[Artifact]:
    """Return artifacts that make five pages quickly; equal for every root."""
    found = sample_artifacts(Store(root))
    return [item for item in found if item.manifest.stage in ("generate_prompts", "heads", "circuits")]


def test_a_report_that_is_killed_and_made_again_is_that_of_an_uninterrupted_run(tmp_path):
    line = [sys.executable, "-m", "tests.stages.test_report", str(tmp_path / "killed"), "2"]
    done = subprocess.run(line, check=False, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == -signal.SIGKILL
    inputs = Inputs(some_artifacts(tmp_path / "samples"))
    resumed = execute(STAGE, sample_config(), inputs, Store(tmp_path / "killed"))
    whole = execute(STAGE, sample_config(), inputs, Store(tmp_path / "whole"))
    assert (resumed.outcome, whole.outcome) == ("Resumed", "Completed")
    assert resumed.artifact.id == whole.artifact.id
    assert resumed.artifact.digest == whole.artifact.digest
    assert resumed.artifact.summary == whole.artifact.summary
    listings = [item.artifact.read_json("report.json") for item in (resumed, whole)]
    assert listings[0] == listings[1]


def test_a_report_of_nothing_has_its_first_page(store):
    result = execute(STAGE, ReportConfig(), Inputs([]), store)
    assert result.artifact.summary == {"n_pages": 1, "n_figures": 0, "n_claims": 0, "n_claims_held": 0}


def test_the_estimate_covers_what_is_written(report):
    found = STAGE.estimate(sample_config(), Inputs(sources(report)))
    assert found.n_units == 14
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

    artifacts = some_artifacts(f"{root}-samples")
    mark = Ledger.mark

    def mark_and_die(ledger, unit, **info):
        mark(ledger, unit, **info)
        if ledger.n_done >= n_pages and ledger.n_total:
            os.kill(os.getpid(), signal.SIGKILL)

    Ledger.mark = mark_and_die
    execute(STAGE, sample_config(), Inputs(artifacts), Store(root))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
