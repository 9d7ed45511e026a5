"""A short storm in every run of the tests, the long one with `-m storm`."""

import pytest

from tests.faults.corruption_storm import DAMAGES, storm


def test_damage_is_found_and_never_read():
    tally = storm(40, seed=1)
    assert tally.problems == []
    assert (tally.tried, tally.found, tally.misread) == (40, 40, 0)
    assert set(tally.by_damage) == set(DAMAGES)


@pytest.mark.storm
def test_a_thousand_damages_are_found_and_never_read():
    tally = storm(1000, seed=2)
    assert tally.problems == []
    assert (tally.tried, tally.found, tally.misread) == (1000, 1000, 0)
    assert tally.refused > 1000
