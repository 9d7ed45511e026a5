import numpy as np
import pytest

from mi_pipe.heads.evidence import logit_share, place_evidence, prompts_evidence

NAMES = ["io", "s1", "s1+1", "s2", "end"]


def test_attention_between_places_is_a_mean_over_the_pairs_that_have_them():
    places = np.full((3, 1, 1, 5, 5), np.nan)
    places[0, ..., 4, 0], places[1, ..., 4, 0] = 0.25, 0.75
    found = place_evidence(places, NAMES)
    assert found["end_to_io"] == pytest.approx(0.5)
    assert np.isnan(found["s2_to_s1"]).all(), "what no pair has is not measured, not zero"


def test_habits_are_means_over_tasks_of_means_over_pairs():
    first, second = np.zeros((1, 1, 1, 4)), np.zeros((3, 1, 1, 4))
    first[..., 3], second[..., 3] = 0.9, 0.3
    assert prompts_evidence([first, second])["prompts_previous_token"] == pytest.approx(0.6)
    assert prompts_evidence([]) == {}


def test_shares_keep_the_sign_of_what_is_written():
    contributions = np.array([[[1.0, -3.0]], [[3.0, -1.0]]])
    np.testing.assert_allclose(logit_share(contributions, np.array([-3.0, -5.0])), [[0.5, -0.5]])
