"""A short storm in every run of the tests, the long one with `-m storm`."""

import pytest

from tests.faults.kill_storm import storm


def test_kills_lose_and_tear_nothing():
    toll = storm(9, seed=1, n_prompts=300)
    assert toll.kills == 9
    assert (toll.lost, toll.torn, toll.hash_equal) == (0, 0, True)


@pytest.mark.storm
def test_two_hundred_kills_lose_and_tear_nothing():
    toll = storm(200, seed=2)
    assert toll.kills >= 200
    assert (toll.lost, toll.torn, toll.hash_equal) == (0, 0, True)
    assert toll.found_unfinished > 20, "the kills came while shards were being written"
