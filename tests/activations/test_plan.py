"""The plan fixes rows and batches; shards are pure functions of it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mi_pipe.activations.layout import ArrayLayout, StoreLayout
from mi_pipe.activations.plan import HarvestPlan, Tokens, kept_tokens


def make_plan(lengths, shard_rows=16, batch_tokens=24, bos_id=0, keep_bos=False, seed=0):
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 5, sum(lengths)).astype(np.int32)
    ids[:1] = 0
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    tokens = Tokens(ids, offsets, kept_tokens(ids, offsets, bos_id, keep_bos))
    array = ArrayLayout("hook", (3,), "d_model", "float16", 4, shard_rows)
    return HarvestPlan(tokens, StoreLayout(tokens.n_rows, shard_rows, (array,)), batch_tokens, {})


@given(st.lists(st.integers(0, 40), min_size=1, max_size=60), st.sampled_from([4, 16, 64]), st.integers(1, 100))
@settings(max_examples=100, deadline=None)
def test_every_row_is_in_one_batch_and_every_shard_knows_its_batches(lengths, shard_rows, batch_tokens):
    plan = make_plan(lengths, shard_rows, batch_tokens)
    batches = [plan.batch(i) for i in range(plan.n_batches)]
    rows = np.concatenate([batch.rows for batch in batches]) if batches else np.empty(0, np.int64)
    np.testing.assert_array_equal(np.sort(rows), np.arange(plan.tokens.n_rows))
    arrays = plan.tokens.row_arrays()
    for batch in batches:
        assert len(batch.tokens) == 1 or batch.tokens.size <= batch_tokens
        assert (np.diff(batch.rows) > 0).all()
        np.testing.assert_array_equal(arrays["token_id"][batch.rows], batch.tokens[batch.kept])
        np.testing.assert_array_equal(arrays["pos"][batch.rows], np.nonzero(batch.kept)[1])
    for shard in range(plan.layout.n_shards):
        expected = [b.number for b in batches if ((b.rows // shard_rows) == shard).any()]
        assert plan.batches_of(shard) == expected
    assert all(plan.last_shard(b.number) == b.rows[-1] // shard_rows for b in batches)


def test_batches_of_one_length_are_full_but_for_the_last():
    plan = make_plan([8] * 50, shard_rows=32, batch_tokens=40, bos_id=None)
    assert [len(plan.batch(i).tokens) for i in range(plan.n_batches)] == [5] * 10


def test_a_rare_length_does_not_keep_a_batch_open_for_long():
    plan = make_plan([7] + [8] * 100, shard_rows=16, batch_tokens=80, bos_id=None)
    assert plan.last_shard(next(i for i in range(plan.n_batches) if plan.batch(i).tokens.shape[1] == 7)) == 0
    assert max(max(plan.batches_of(shard)) - min(plan.batches_of(shard)) for shard in range(plan.layout.n_shards)) < 3


@pytest.mark.parametrize(("bos_id", "keep_bos", "expected"), [(3, False, 5), (3, True, 7), (None, False, 7)])
def test_only_a_bos_at_the_start_is_left_out(bos_id, keep_bos, expected):
    ids, offsets = np.array([3, 1, 3, 3, 2, 1, 2]), np.array([0, 3, 3, 5, 7])
    assert kept_tokens(ids, offsets, bos_id, keep_bos).sum() == expected


def test_the_hash_changes_with_whatever_changes_bytes():
    lengths = [9, 9, 30]
    plans = [
        make_plan(lengths),
        make_plan(lengths, seed=1),
        make_plan(lengths, batch_tokens=25),
        make_plan(lengths, shard_rows=8),
        make_plan(lengths, keep_bos=True),
        make_plan([9, 10, 29]),
    ]
    assert len({plan.hash for plan in plans}) == len(plans)
    assert make_plan(lengths).hash == plans[0].hash
