"""The plan fixes rows and batches; shards are pure functions of it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mi_pipe.activations.harvest.batches import Batching
from mi_pipe.activations.harvest.plan import HarvestPlan
from mi_pipe.activations.harvest.positions import kept_tokens
from mi_pipe.activations.layout import ArrayLayout, StoreLayout
from mi_pipe.activations.tokens import Tokens


def make_plan(lengths, shard_rows=16, batch_tokens=24, bos_id=0, keep_bos=False, seed=0, may_pad=True, halvings=0):
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 5, sum(lengths)).astype(np.int32)
    ids[:1] = 0
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    tokens = Tokens(ids, offsets, kept_tokens(ids, offsets, bos_id, keep_bos))
    array = ArrayLayout("hook", (3,), "d_model", "float16", 4, shard_rows)
    return HarvestPlan(
        tokens, StoreLayout(tokens.n_rows, shard_rows, (array,)), Batching(batch_tokens, may_pad, halvings), {}
    )


@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=60),
    st.sampled_from([4, 16, 64]),
    st.integers(1, 100),
    st.booleans(),
    st.integers(0, 2),
)
@settings(max_examples=100, deadline=None)
def test_every_row_is_in_one_batch_and_every_shard_knows_its_batches(
    lengths, shard_rows, batch_tokens, may_pad, halvings
):
    plan = make_plan(lengths, shard_rows, batch_tokens, may_pad=may_pad, halvings=halvings)
    batches = [plan.batch(i) for i in range(plan.n_batches)]
    rows = np.concatenate([batch.rows for batch in batches]) if batches else np.empty(0, np.int64)
    np.testing.assert_array_equal(np.sort(rows), np.arange(plan.tokens.n_rows))
    arrays = plan.tokens.row_arrays()
    for batch in batches:
        assert len(batch.tokens) == 1 or batch.tokens.size <= batch_tokens
        assert (np.diff(batch.rows) > 0).all()
        np.testing.assert_array_equal(arrays["token_id"][batch.rows], batch.tokens[batch.kept])
        np.testing.assert_array_equal(arrays["pos"][batch.rows], np.nonzero(batch.kept)[1])
        # A prompt's tokens are all there, also those that are no rows, from position 0 on: attention sees them.
        for row_of_batch, prompt in enumerate(np.unique(arrays["prompt_idx"][batch.rows])):
            own = plan.tokens.ids[plan.tokens.offsets[prompt] : plan.tokens.offsets[prompt + 1]]
            np.testing.assert_array_equal(batch.tokens[row_of_batch, : len(own)], own)
            assert may_pad or len(own) == batch.tokens.shape[1]
    for shard in range(plan.layout.n_shards):
        expected = [b.number for b in batches if ((b.rows // shard_rows) == shard).any()]
        assert plan.batches_of(shard) == expected
    assert all(plan.last_shard(b.number) == b.rows[-1] // shard_rows for b in batches)


def test_batches_of_one_length_are_full_but_for_the_last():
    plan = make_plan([8] * 50, shard_rows=32, batch_tokens=40, bos_id=None)
    assert [len(plan.batch(i).tokens) for i in range(plan.n_batches)] == [5] * 10


def test_prompts_of_many_lengths_are_padded_to_full_batches_with_little_padding():
    lengths = np.random.default_rng(0).integers(20, 520, 2000).tolist()
    plans = {may_pad: make_plan(lengths, 65536, 16384, bos_id=None, may_pad=may_pad) for may_pad in (True, False)}
    n_tokens, fewest = sum(lengths), sum(lengths) / 16384
    assert plans[False].n_batches > 12 * fewest
    assert plans[True].n_batches < 3 * fewest
    run = sum(plans[True].batch(i).tokens.size for i in range(plans[True].n_batches))
    assert n_tokens <= run < 1.08 * n_tokens
    again = make_plan(lengths, 65536, 16384, bos_id=None)
    for i in range(again.n_batches):
        np.testing.assert_array_equal(again.batch(i).tokens, plans[True].batch(i).tokens)


def test_prompts_of_few_lengths_are_not_padded():
    plan = make_plan([20, 30, 50] * 200, 1024, 600, bos_id=None)
    assert all(plan.batch(i).kept.all() for i in range(plan.n_batches))


def test_halving_cuts_every_batch_of_several_prompts_in_two():
    whole, halves = (make_plan([8] * 50 + [40], 512, 64, bos_id=None, halvings=h) for h in (0, 1))
    sizes = [len(whole.batch(i).tokens) for i in range(whole.n_batches)]
    assert (sizes, whole.largest_batch) == ([8] * 6 + [1, 2], 8)
    assert [len(halves.batch(i).tokens) for i in range(halves.n_batches)] == [4] * 12 + [1, 1, 1]
    assert whole.hash != halves.hash


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
        make_plan(lengths, may_pad=False),
    ]
    assert len({plan.hash for plan in plans}) == len(plans)
    assert make_plan(lengths).hash == plans[0].hash
