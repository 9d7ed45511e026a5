"""Blocks are the rows in order, each once, in memory of constant size."""

import numpy as np
import pytest

from mi_pipe.core.errors import ConfigError
from mi_pipe.core.store import Store
from tests.activations.harvests import HEADS, RESIDUAL, harvest_toy


@pytest.fixture(scope="module")
def acts(tmp_path_factory):
    return harvest_toy(Store(tmp_path_factory.mktemp("acts")), [30] * 9 + [17] * 3, shard_rows=64)


@pytest.mark.parametrize("size", [1, 7, 64, 100, 10_000])
def test_every_row_comes_once_in_order(acts, size):
    whole = acts.read_rows(RESIDUAL, 0, acts.n_rows)
    rows, values = zip(*((block.rows, block.values.copy()) for block in acts.blocks(RESIDUAL, size)), strict=True)
    assert max(map(len, rows)) <= size
    assert len(rows) <= acts.n_rows / min(size, 64) + 6
    np.testing.assert_array_equal(np.concatenate(rows), np.arange(acts.n_rows))
    np.testing.assert_array_equal(np.concatenate(values), whole)


@pytest.mark.parametrize("size", [1, 7, 64, 10_000])
@pytest.mark.parametrize("where", ["pos > 25", "pos == 3", "prompt_idx == 2 or prompt_idx == 7", "pos >= 0"])
def test_only_the_rows_of_a_condition_come(acts, size, where):
    whole = acts.read_rows(HEADS, 0, acts.n_rows)
    blocks = [(block.rows, block.values.copy()) for block in acts.blocks(HEADS, size, where)]
    rows = np.concatenate([rows for rows, _ in blocks])
    np.testing.assert_array_equal(rows, acts.rows(where))
    np.testing.assert_array_equal(np.concatenate([values for _, values in blocks]), whole[rows])
    assert max(len(values) for _, values in blocks) <= size


def test_the_memory_is_reused(acts):
    assert len({block.values.__array_interface__["data"][0] for block in acts.blocks(RESIDUAL, 32)}) == 1


def test_nothing_comes_where_nothing_is_picked_and_nonsense_is_refused(acts):
    assert list(acts.blocks(RESIDUAL, 32, "pos > 1000")) == []
    with pytest.raises(ConfigError):
        acts.blocks(RESIDUAL, 32, "nonsense > 3")
