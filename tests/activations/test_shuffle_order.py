"""The order of training rows is what its module says, computed here row by row."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from mi_pipe.activations.training.shuffle_order import ShuffleOrder


def random(*stream):
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(list(stream))))


def naive_epoch(is_training, block_rows, pool_rows, seed, epoch):
    """Return the pools of an epoch as lists of the store's rows, in the order in which these leave."""
    rows = np.arange(len(is_training))
    blocks = [rows[start : start + block_rows] for start in range(0, len(rows), block_rows)]
    n_pools = max(1, -(-int(is_training.sum()) // pool_rows))
    pools = [[] for _ in range(n_pools)]
    before = 0
    for block in random(seed, 1, epoch).permutation(len(blocks)):
        # A block goes to the pool that its first training row falls into, were the rows shared out equally.
        pools[before * n_pools // int(is_training.sum()) if before < is_training.sum() else -1].append(blocks[block])
        before += int(is_training[blocks[block]].sum())
    orders = []
    for number, members in enumerate(pools):
        held = np.concatenate([np.empty(0, np.int64), *members])
        orders.append(random(seed, 2, epoch, number).permutation(held[is_training[held]]).tolist())
    return orders


def rows_of(order, segment):
    memory = [
        row for start, stop in zip(segment.block_starts, segment.block_stops, strict=True) for row in range(start, stop)
    ]
    assert len(memory) == segment.n_rows
    return [memory[place] for place in order.leaving(segment)]


@given(
    st.integers(1, 300),
    st.sampled_from([1, 4, 32]),
    st.sampled_from([10, 50, 1000]),
    st.integers(1, 20),
    st.floats(0.1, 1.0),
    st.integers(0, 3),
)
@settings(max_examples=60, deadline=None)
def test_it_equals_the_order_computed_row_by_row(n_rows, block_rows, pool_rows, batch_rows, share, seed):
    is_training = np.random.default_rng(seed).random(n_rows) < share
    is_training[0] = True
    batch_rows = min(batch_rows, int(is_training.sum()))
    order = ShuffleOrder(is_training, block_rows, batch_rows, pool_rows, seed)
    n_steps = order.n_steps_per_epoch
    stream = []
    for epoch in range(3):
        whole = [row for pool in naive_epoch(is_training, block_rows, pool_rows, seed, epoch) for row in pool]
        assert sorted(whole) == np.flatnonzero(is_training).tolist()
        stream += whole[: n_steps * batch_rows]
    for first, last in ((0, 3 * n_steps), (n_steps // 2, n_steps + 1), (2 * n_steps, 2 * n_steps + 1)):
        found = [row for segment in order.segments(first, last) for row in rows_of(order, segment)]
        assert found == stream[first * batch_rows : last * batch_rows]
