"""The reader's benchmark measures what it says, on a store of known rows."""

import numpy as np
import pytest

from bench.reader import figures
from bench.synthetic_store import HOOK, SyntheticConfig, row_numbers, synthetic_store


@pytest.fixture(scope="module")
def acts(tmp_path_factory):
    with synthetic_store(SyntheticConfig(n_prompts=128, n_ctx=128, width=16), tmp_path_factory.mktemp("b")) as store:
        yield store


def test_rows_tell_their_numbers(acts):
    assert acts.n_rows == 128 * 128
    np.testing.assert_array_equal(row_numbers(acts.read_rows(HOOK, 0, acts.n_rows)), np.arange(acts.n_rows))


def test_every_figure_is_there_and_mates_are_as_the_formula_says(acts):
    found = {name: value for figure in figures(acts, 1) for name, value in figure.items()}
    speeds = ("warm", "float32", "first_epoch", "cold")
    assert {f"{name}_tokens_per_s" for name in speeds} | {"of_copies", "cold_of_disk", "mates", "formula"} < set(found)
    assert found["mates"] == pytest.approx(found["formula"], rel=0.03)
