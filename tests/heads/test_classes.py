import numpy as np
import pandas as pd
import pytest

from mi_pipe.heads.classes import Thresholds, classify, criteria

RULES = criteria(Thresholds())
MOVER = {"end_to_io": 0.6, "logit_share": 0.2, "name_copying": 0.9, "negative_name_copying": 0.0}


def one(**evidence):
    table = classify(pd.DataFrame([{"layer": 3, "head": 1, **evidence}]), RULES)
    return table["classes"][0], table["candidate_for"][0]


def test_a_head_must_meet_every_criterion():
    assert one(previous_token=0.9, prompts_previous_token=0.5) == ("previous_token", "")
    assert one(previous_token=0.9, prompts_previous_token=0.1) == ("", "previous_token")
    assert one(previous_token=0.1, prompts_previous_token=0.1) == ("", "")


def test_one_measured_criterion_is_not_enough():
    assert one(induction=0.9) == ("", "induction")
    assert one(induction=0.9, prefix_matching=0.8) == ("induction", "")


def test_what_was_not_measured_does_not_exclude():
    assert one(**{**MOVER, "name_copying": np.nan})[0] == "name_mover"
    assert one(**{**MOVER, "name_copying": 0.1}) == ("", "name_mover")
    assert one(end_to_io=0.6, logit_share=0.0, name_copying=0.1) == ("", "")


def test_the_sign_of_what_is_written_tells_movers_apart():
    assert one(**MOVER)[0] == "name_mover"
    negative = {**MOVER, "logit_share": -0.2, "name_copying": 0.0, "negative_name_copying": 0.9}
    assert one(**negative)[0] == "negative_name_mover"
    suppressor = {"end_to_s2": 0.5, "logit_share": 0.3, "negative_name_copying": 1.0, "name_mover_attention_loss": 0.0}
    assert one(**suppressor) == ("subject_suppressor", "subject_inhibition")


def test_a_head_can_be_of_two_classes_and_the_evidence_is_shown():
    table = classify(pd.DataFrame([{"layer": 0, "head": 2, **MOVER, "induction": 0.5, "prefix_matching": 0.6}]), RULES)
    assert table["classes"][0] == "induction, name_mover"
    assert table["end_to_io"][0] == 0.6
    assert table["duplicate_token"].isna().all()
    assert list(table.columns[:4]) == ["layer", "head", "classes", "candidate_for"]


def test_thresholds_are_the_users():
    lax = criteria(Thresholds(diagonal=0.1, prompts=0.05))
    table = classify(pd.DataFrame([{"layer": 0, "head": 0, "previous_token": 0.2, "prompts_previous_token": 0.1}]), lax)
    assert table["classes"][0] == "previous_token"
    with pytest.raises(ValueError, match="greater than 0"):
        Thresholds(diagonal=0)
