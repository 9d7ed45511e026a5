import math

import pytest
from pydantic import ValidationError

from mi_pipe.report.claims import Claim, holds, judge, measure


def claim(**changes):
    fields = {"statement": "s", "stage": "heads", "metric": "induction_score", "comparison": ">", "value": 0.5}
    return Claim(**{**fields, **changes})


@pytest.mark.parametrize(
    ("comparison", "value", "measured", "expected"),
    [
        (">", 1.0, 1.0, False),
        (">=", 1.0, 1.0, True),
        ("<", 1.0, 0.5, True),
        ("<=", 1.0, 1.5, False),
        ("==", 3, 3, True),
        ("==", "18.6", "18.6", True),
        ("==", True, True, True),
        ("==", True, False, False),
        ("between", (0.8, 1.2), 1.2, True),
        ("between", (0.8, 1.2), 1.3, False),
        (">", 0.0, math.nan, False),
        (">", 0.0, None, False),
        (">", 0.0, "1.0", False),
        ("between", (0.0, 2.0), True, False),
    ],
)
def test_a_claim_holds_when_the_measured_value_compares(comparison, value, measured, expected):
    assert holds(claim(comparison=comparison, value=value), measured) is expected


@pytest.mark.parametrize(
    "changes",
    [
        {"comparison": "between", "value": 1.0},
        {"comparison": ">", "value": (0.0, 1.0)},
        {"comparison": "between", "value": (1.0, 0.0)},
        {"comparison": ">", "value": "high"},
        {"comparison": "~", "value": 1.0},
        {"metric": ""},
    ],
)
def test_a_value_that_does_not_fit_the_comparison_is_refused(changes):
    with pytest.raises(ValidationError):
        claim(**changes)


def test_numbers_stay_numbers_and_lists_become_pairs():
    assert claim(value=1).value == 1.0
    assert not isinstance(claim(value=1).value, bool)
    assert Claim.model_validate({**claim().model_dump(), "comparison": "between", "value": [0, 1]}).value == (0.0, 1.0)


def test_metrics_are_found_in_summary_manifest_and_tables(artifacts):
    heads = next(item for item in artifacts if item.manifest.stage == "heads")
    assert measure("induction_score", heads) == 0.9
    assert measure("size_bytes", heads) == heads.size_bytes
    assert measure("scores.induction.max", heads) == pytest.approx(0.9)
    assert measure("scores.induction.first", heads) == 0.0
    assert measure("scores.previous_token.min", heads) == 0.0


@pytest.mark.parametrize(
    ("metric", "words"),
    [
        ("induction_scor", "induction_score"),
        ("scores.inductio.max", "induction"),
        ("scores.induction.most", "most"),
        ("nothing.there.max", "nothing.there.max"),
    ],
)
def test_a_metric_that_is_not_there_fails_with_a_reason(artifacts, metric, words):
    verdict = judge(claim(metric=metric), artifacts)
    assert not verdict.holds
    assert verdict.measured is None
    assert words in verdict.reason


def test_a_claim_about_an_absent_stage_does_not_hold(artifacts):
    verdict = judge(claim(stage="harvest"), artifacts)
    assert not verdict.holds
    assert "no artifact of harvest" in verdict.reason


def test_two_artifacts_of_a_stage_need_a_label(artifacts):
    twice = [*artifacts, *artifacts]
    assert "2 artifacts of heads" in judge(claim(), twice).reason


def test_a_task_is_named_by_the_label_with_or_without_its_section(artifacts):
    patch = next(item for item in artifacts if item.manifest.stage == "patch")
    task = patch.manifest.label.removeprefix("patch.")
    for label in (task, patch.manifest.label):
        found = judge(claim(stage="patch", label=label, metric="clean_logit_diff", value=2.0), artifacts)
        assert found.holds
    assert "no artifact" in judge(claim(stage="patch", label="other"), artifacts).reason
