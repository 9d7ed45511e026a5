"""Twenty kills of each architecture's training, with `-m storm`; one kill of a sweep is in every run of the tests."""

import random

import pytest

from tests.faults.training_storm import storm
from tests.saes.test_training import ARCHITECTURES


@pytest.mark.storm
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_kills_change_no_bit(architecture, tmp_path):
    toll = storm(architecture, 20, tmp_path, random.Random(3))
    assert toll["kills"] == 20
    assert toll["hash_equal"]
