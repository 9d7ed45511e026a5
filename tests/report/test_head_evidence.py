import numpy as np
import pandas as pd
import pytest
import xarray as xr

from mi_pipe.attention.head_scores import HeadScores
from mi_pipe.core.errors import ConfigError
from mi_pipe.report import heads
from mi_pipe.report.head_evidence import classes_shown, components, evidence, strongest_pairs
from tests.report.test_pages import of
from tests.stages.toys import publish


@pytest.fixture
def artifact(artifacts):
    return of(artifacts, "heads")[0]


def test_classes_show_their_heads_with_the_evidence_they_ask_for(artifact):
    shown = {found["name"]: found for found in classes_shown(artifact.classes(), artifact.criteria)}
    assert list(shown) == ["induction", "name mover"], "classes without heads are left out"
    movers = shown["name mover"]["heads"]
    assert list(movers.columns) == ["head", "is it", "end_to_io", "logit_share", "name_copying"]
    assert movers.iloc[0, :4].tolist() == ["1.0", "yes", pytest.approx(0.6), pytest.approx(0.3)]
    assert shown["induction"]["heads"][["head", "is it"]].to_numpy().tolist() == [["0.1", "nearly"]]
    assert "end to io ≥ 0.3" in shown["name mover"]["rules"]


def test_members_stand_before_candidates_and_negative_evidence_begins_with_the_lowest():
    rules = {"against": [{"evidence": "written", "threshold": -0.1}, {"evidence": "copied", "threshold": 0.5}]}
    table = pd.DataFrame({"layer": 0, "head": [0, 1, 2, 3], "written": [-0.2, -0.9, -0.4, 0.3], "copied": 0.7})
    table["classes"] = ["against", "", "against, other", ""]
    table["candidate_for"] = ["", "against", "", ""]
    (found,) = classes_shown(table, rules)
    assert found["rules"] == "written ≤ -0.1, copied ≥ 0.5"
    assert found["heads"]["head"].tolist() == ["0.2", "0.0", "0.1"]
    assert found["heads"]["is it"].tolist() == ["yes", "yes", "nearly"]


def test_components_are_means_in_order_of_size_and_sum_to_the_logit_difference(artifact):
    attribution = artifact.attribution("ioi")
    table = components(attribution)
    assert table["contribution"].abs().is_monotonic_decreasing
    assert table["contribution"].sum() == pytest.approx(float(attribution["logit_diff"].mean()), abs=1e-4)
    named = table.set_index("component")["contribution"]
    assert named["1.2"] == pytest.approx(float(attribution["heads"].mean("pair")[1, 2]), abs=1e-6)


def test_strongest_pairs_leave_out_what_is_not_later(artifact):
    scores = artifact.composition().sel(kind="q")
    pairs = strongest_pairs(scores, n=100)
    assert len(pairs) == 9, "three heads of layer 0 with three of layer 1"
    assert set(pairs["earlier"]) == {"0.0", "0.1", "0.2"}
    assert pairs["score"].iloc[0] == pytest.approx(float(scores.max()))
    assert strongest_pairs(xr.full_like(scores, np.nan)).empty


def test_the_page_has_a_figure_for_all_that_it_names(artifact):
    page = heads.page([artifact])
    section = page.context["sections"][0]
    names = [figure.name for figure in page.figures]
    assert len(names) == len(set(names))
    for task in section["tasks"]:
        assert {*task["attribution"], *task["places"]} <= set(names)
        assert len(task["places"]) == 3
    assert {kind["figure"] for kind in section["composition"]["kinds"]} <= set(names)
    assert section["refused"] == {"attribution of facts": "<b>no</b>"}
    assert set(page.tables) == {f"{table}-{section['slug']}" for table in ("scores", "classes", "attribution-ioi")}


def test_an_artifact_of_the_first_version_has_scores_alone(store):
    def fill(work):
        work.write_table("scores.parquet", pd.DataFrame({"layer": [0], "head": [0], "induction": [0.5]}))
        work.write_json("loss.json", {"first_half": 4.0})

    old = HeadScores(publish(store, "heads", "0" * 16, fill, {}))
    found = evidence(old)
    assert found.figures == []
    assert found.context["classes"] is None
    assert heads.page([old]).context["sections"][0]["tasks"] == []
    for ask in (old.classes, old.composition):
        with pytest.raises(ConfigError, match="has no c"):
            ask()
