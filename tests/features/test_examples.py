import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mi_pipe.features.examples import choose_examples, quantile_samples, random_keys, strongest_first
from mi_pipe.features.firings import Firings
from tests.features.dense_firings import firings_of, matrices, sparse_matrix

MASK = (1 << 64) - 1


def split_mix(value):
    """SplitMix64 in Python integers."""
    value = (value + 0x9E3779B97F4A7C15) & MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK
    return value ^ (value >> 31)


def brute_examples(dense, prompt_of_row, n_top, n_quantiles, n_per_quantile, seed):
    found = []
    for feature, column in enumerate(dense.T):
        firing = sorted((-column[row], row) for row in range(len(column)) if column[row] > 0)
        top, seen = [], set()
        for value, row in firing:
            if prompt_of_row[row] not in seen and len(top) < n_top:
                seen.add(prompt_of_row[row])
                top.append((value, row))
        groups = [top]
        for q in range(n_quantiles):
            members = [
                (value, row)
                for place, (value, row) in enumerate(firing)
                if (len(firing) - 1 - place) * n_quantiles // len(firing) == q
            ]
            key = {row: split_mix((split_mix((split_mix(seed) + feature) & MASK) + row) & MASK) for _, row in members}
            groups.append(sorted(sorted(members, key=lambda item: key[item[1]])[:n_per_quantile]))
        for code, group in enumerate(groups):
            found += [(feature, code, rank, row, -value) for rank, (value, row) in enumerate(group)]
    return found


def as_tuples(examples):
    columns = (examples.feature, examples.group, examples.rank, examples.row, examples.activation)
    return list(zip(*(column.tolist() for column in columns), strict=True))


@given(matrices, st.integers(1, 6), st.integers(0, 5), st.integers(1, 4), st.integers(0, 2**63))
def test_the_choice_is_that_of_a_plain_loop(dense, n_top, n_quantiles, n_per_quantile, seed):
    prompt_of_row = np.arange(len(dense)) // 7
    found = choose_examples(firings_of(dense), prompt_of_row, n_top, n_quantiles, n_per_quantile, seed)
    assert as_tuples(found) == brute_examples(dense, prompt_of_row, n_top, n_quantiles, n_per_quantile, seed)


def test_ties_go_to_the_earlier_row_and_a_prompt_appears_once():
    dense = np.array([[2], [5], [5], [1], [5], [3]], np.float32)
    found = choose_examples(firings_of(dense), np.array([0, 0, 0, 1, 2, 2]), 3, 1, 1, 0)
    top = found.group == 0
    assert found.row[top].tolist() == [1, 4, 3]
    assert found.activation[top].tolist() == [5, 5, 1]
    assert found.rank[top].tolist() == [0, 1, 2]


def test_group_names_are_top_and_the_quantiles():
    found = choose_examples(firings_of(np.ones((4, 1), np.float32)), np.zeros(4, int), 1, 2, 1, 0)
    assert found.group_names == ["top", "q0", "q1"]


def test_a_feature_of_one_prompt_is_searched_to_its_end():
    dense = np.linspace(9, 1, 500, dtype=np.float32)[:, None]
    prompt = np.zeros(500, int)
    prompt[[300, 499]] = [1, 2]
    found = choose_examples(firings_of(dense), prompt, 5, 1, 1, 0)
    assert found.row[found.group == 0].tolist() == [0, 300, 499]


def test_features_scored_apart_are_chosen_as_together():
    dense = sparse_matrix(80, 6, 0.4, 3)
    prompt = np.arange(80) // 8
    whole = as_tuples(choose_examples(firings_of(dense), prompt, 3, 3, 2, 9))
    apart = []
    for first in (0, 2, 4):
        apart += as_tuples(choose_examples(firings_of(dense[:, first : first + 2], first), prompt, 3, 3, 2, 9))
    assert apart == whole


def test_no_firings_give_no_examples():
    empty = Firings(0, np.zeros(4, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32))
    assert as_tuples(choose_examples(empty, np.zeros(0, int), 3, 2, 2, 0)) == []


def test_samples_of_a_quantile_are_uniform_over_its_rows():
    """Chi-square over 20 rows and 4,000 seeds: 19 degrees of freedom, so above 50 happens once in 10,000."""
    order = strongest_first(np.ones(20, np.float32))
    hits = np.zeros(20)
    for seed in range(4_000):
        hits[quantile_samples(order, random_keys(seed, 3, np.arange(20)), 1, 5)[0]] += 1
    expected = 4_000 * 5 / 20
    assert ((hits - expected) ** 2 / expected).sum() * 20 / 15 < 50


@pytest.mark.parametrize(("n", "n_quantiles"), [(10, 3), (3, 5), (1, 4), (1000, 7)])
def test_quantiles_are_of_equal_size_and_ordered(n, n_quantiles):
    activation = np.random.default_rng(0).random(n).astype(np.float32)
    groups = quantile_samples(strongest_first(activation), random_keys(0, 0, np.arange(n)), n_quantiles, n)
    assert sorted(np.concatenate(groups).tolist()) == list(range(n))
    sizes = [len(group) for group in groups]
    assert max(sizes) - min(sizes) <= 1
    filled = [activation[group] for group in groups if len(group)]
    assert all(low.max() <= high.min() for low, high in itertools.pairwise(filled))
