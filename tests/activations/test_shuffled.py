"""The training reader: every training row once an epoch, any step restartable, held-out and massive rows never."""

import itertools
import json
import threading

import numpy as np
import pytest
import torch

from mi_pipe.activations.training.shuffled import ShuffledReader
from mi_pipe.core.errors import ArtifactDamagedError, ConfigError, HookPointError
from mi_pipe.core.store import Store
from tests.activations.harvests import HEADS, RESIDUAL, harvest_toy
from tests.activations.test_store import damage


@pytest.fixture(scope="module")
def acts(tmp_path_factory):
    fields = {"precision": "float32", "store_dtype": "float32", "massive_factor": 1.4}
    return harvest_toy(Store(tmp_path_factory.mktemp("acts")), [30] * 40 + [17] * 21, **fields)


@pytest.fixture(scope="module")
def row_of(acts):
    """Rows by their values, which are all different."""
    return {values.tobytes(): row for row, values in enumerate(acts.read_rows(RESIDUAL, 0, acts.n_rows))}


def rows_in(batch, row_of):
    return [row_of[values.tobytes()] for values in batch[RESIDUAL].numpy()]


def reader_of(acts, **fields):
    options = {"batch_rows": 50, "seed": 7, "pool_rows": 300, "held_out_fraction": 0.1, "split_seed": 1}
    return ShuffledReader(acts, [RESIDUAL, HEADS], **{**options, **fields})


@pytest.mark.parametrize("pool_rows", [10, 300, 1 << 18])
def test_every_training_row_comes_once_an_epoch(acts, row_of, pool_rows):
    reader = reader_of(acts, pool_rows=pool_rows)
    train = acts.prompt_split(0.1, 1)[0] & ~acts.massive(RESIDUAL) & ~acts.massive(HEADS)
    assert reader.n_rows == train.sum()
    assert reader.n_steps_per_epoch == train.sum() // 50
    orders = []
    for epoch in range(2):
        n = reader.n_steps_per_epoch
        rows = [row for batch in reader.batches(epoch * n, n) for row in rows_in(batch, row_of)]
        assert len(set(rows)) == len(rows) == n * 50
        assert set(rows) <= set(np.flatnonzero(train))
        orders.append(rows)
    assert orders[0] != orders[1]


def test_hook_points_are_row_aligned_in_float32(acts, row_of):
    heads = acts.read_rows(HEADS, 0, acts.n_rows)
    for batch in reader_of(acts).batches(0, 5):
        assert batch[HEADS].dtype == torch.float32
        np.testing.assert_array_equal(batch[HEADS].numpy(), heads[rows_in(batch, row_of)])


def test_any_step_can_be_the_first(acts):
    n = reader_of(acts).n_steps_per_epoch
    whole = list(reader_of(acts).batches(0, 2 * n + 5))
    for first, count in ((0, 1), (3, 4), (n - 1, 3), (n, 2), (2 * n + 1, 4)):
        again = list(reader_of(acts).batches(first, count))
        assert len(again) == count
        for batch, expected in zip(again, whole[first:], strict=False):
            assert all(torch.equal(batch[hook], expected[hook]) for hook in (RESIDUAL, HEADS))
    assert list(reader_of(acts).batches(4, 0)) == []


def test_seeds_give_different_orders_and_batches_mix_prompts(acts, row_of):
    first, other = (next(iter(reader_of(acts, seed=seed).batches(0, 1))) for seed in (1, 2))
    assert not torch.equal(first[RESIDUAL], other[RESIDUAL])
    prompts = acts.prompt_idx[rows_in(next(iter(reader_of(acts, pool_rows=1 << 18).batches(0, 1))), row_of)]
    assert len(np.unique(prompts)) > 20


def test_batches_stay_what_they_were_while_reading_goes_on(acts):
    kept, copies = [], []
    for batch in reader_of(acts).batches(0, 30):
        kept.append(batch[RESIDUAL])
        copies.append(batch[RESIDUAL].clone())
    assert all(torch.equal(a, b) for a, b in zip(kept, copies, strict=True))


def test_stopping_early_ends_the_threads(acts):
    before = threading.active_count()
    stream = reader_of(acts).batches(0, 10_000)
    assert len(list(itertools.islice(stream, 3))) == 3
    stream.close()
    assert threading.active_count() == before


@pytest.mark.parametrize("store_dtype", ["float16", "bfloat16", "float32"])
def test_rows_come_as_they_are_stored_or_as_their_exact_float32_values(tmp_path, store_dtype):
    acts = harvest_toy(Store(tmp_path), [30] * 10, store_dtype=store_dtype)
    reader = ShuffledReader(acts, [RESIDUAL, HEADS], 64, held_out_fraction=0.0)
    known = {row.tobytes() for row in acts.read_rows(RESIDUAL, 0, acts.n_rows)}
    for wide, stored in zip(reader.batches(0, 9), reader.batches(0, 9, "stored"), strict=True):
        assert stored[HEADS].dtype == getattr(torch, store_dtype)
        assert all(torch.equal(wide[hook], stored[hook].float()) for hook in (RESIDUAL, HEADS))
        assert {row.numpy().tobytes() for row in wide[RESIDUAL]} <= known


def test_for_another_device_rows_travel_as_they_are_stored_and_are_converted_there(tmp_path):
    acts = harvest_toy(Store(tmp_path), [30] * 10)
    reader = ShuffledReader(acts, [RESIDUAL], 64, held_out_fraction=0.0)
    for dtype, expected in (("stored", torch.float16), ("float32", torch.float32)):
        found = [batch[RESIDUAL] for batch in reader.batches(0, 5, dtype, device="meta")]
        assert [(values.device.type, values.dtype, values.shape) for values in found] == [
            ("meta", expected, (64, 32))
        ] * 5


def test_no_memory_is_allocated_while_batches_are_dropped(acts):
    addresses = {batch[RESIDUAL].data_ptr() for batch in reader_of(acts).batches(0, 200)}
    assert len(addresses) <= 8


@pytest.mark.parametrize("as_text", [True, False])
def test_only_rows_that_are_wanted_come(acts, row_of, as_text):
    wanted = acts.pos > 5
    reader = reader_of(acts, where="pos > 5" if as_text else wanted)
    rows = [row for batch in reader.batches(0, reader.n_steps_per_epoch) for row in rows_in(batch, row_of)]
    assert len(rows) > 300
    assert wanted[rows].all()


def test_consumers_share_one_pass(acts, monkeypatch):
    reader = reader_of(acts)
    alone = [batch[RESIDUAL].clone() for batch in reader.batches(3, 40)]
    array = acts.array(RESIDUAL)
    read, read_into = [], array.read_into
    monkeypatch.setattr(array, "read_into", lambda out, start: (read.append(start), read_into(out, start)))
    for batches in zip(alone, *reader.shared(3, 3, 40), strict=True):
        expected, *found = batches
        assert all(torch.equal(batch[RESIDUAL], expected) for batch in found)
    once = len(read)
    list(reader.batches(3, 40))
    assert len(read) == 2 * once


def test_a_state_leads_back_to_its_step_and_to_no_other_stream(acts):
    reader = reader_of(acts)
    step = 2 * reader.n_steps_per_epoch + 3
    state = json.loads(json.dumps(reader.state(step)))
    assert (state["seed"], state["epoch"], state["step"]) == (7, 2, 3)
    assert reader_of(acts).step_of(state) == step
    for other in ({"seed": 8}, {"batch_rows": 49}, {"pool_rows": 299}, {"split_seed": 2}, {"where": acts.pos > 1}):
        with pytest.raises(ConfigError, match="another stream"):
            reader_of(acts, **other).step_of(state)


def test_what_cannot_be_read_is_said_at_once(acts):
    with pytest.raises(ConfigError, match="training rows"):
        reader_of(acts, batch_rows=100_000)
    with pytest.raises(HookPointError):
        ShuffledReader(acts, ["blocks.0.hook_resid_pre"], 10)


@pytest.mark.parametrize("how", ["flip", "cut", "gone"])
def test_damage_raises_in_the_callers_thread(tmp_path, how):
    acts = harvest_toy(Store(tmp_path), [40] * 8)
    reader = ShuffledReader(acts, [RESIDUAL], 32, held_out_fraction=0.0)
    damage(acts, how)
    with pytest.raises(ArtifactDamagedError, match="c/2/0"):
        list(reader.batches(0, reader.n_steps_per_epoch))
