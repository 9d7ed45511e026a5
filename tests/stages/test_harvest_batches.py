"""What a harvest runs together, padded where lengths differ and halved where memory is short, leaves the rows alone."""

import logging

import numpy as np
import pytest
import torch

from mi_pipe.activations.harvest.forward import BatchTooLargeError, ForwardPass
from mi_pipe.activations.store import ActivationStore
from mi_pipe.core.stage import execute
from mi_pipe.core.store import Store
from mi_pipe.models.handle import resolve_model
from mi_pipe.models.trained import TrainedModel
from stages import harvest
from tests.activations.harvests import HEADS, RESIDUAL, harvest_toy, random_prompts, tree_hashes
from tests.models.tiny import save_tiny_llama
from tests.stages.toys import publish, toy_model

MIXED = np.random.default_rng(3).integers(1, 60, 150).tolist()


def rows_of(acts):
    return {hook: acts.read_rows(hook, 0, acts.n_rows) for hook in acts.hooks}


def harvest_of(model, store, lengths, **fields):
    config = {"shard_rows": 512, "device": "cpu", "precision": "float32", "store_dtype": "float32", **fields}
    inputs = harvest.Inputs(model, random_prompts(store, lengths, d_vocab=50))
    return ActivationStore(execute(harvest.STAGE, harvest.HarvestConfig(**config), inputs, store).artifact.path)


@pytest.mark.parametrize("family", ["llama", "native"])
def test_rows_of_padded_batches_are_those_of_exact_ones(family, store, tmp_path, monkeypatch):
    model = toy_model(store)
    hooks = [RESIDUAL, HEADS, "blocks.1.attn.hook_k"]
    if family == "llama":
        model = resolve_model(str(save_tiny_llama(tmp_path / "llama")), store, device="cpu")
    shapes = []
    original = ForwardPass.start
    monkeypatch.setattr(ForwardPass, "start", lambda self, batch: (shapes.append(batch.kept), original(self, batch))[1])
    padded = harvest_of(model, store, MIXED, hooks=hooks, batch_tokens=2400)
    n_padded, n_exact = len(shapes), len(set(MIXED))
    assert n_padded * 2 <= n_exact, "far fewer batches than lengths"
    assert any(not kept[:, -1].all() for kept in shapes), "prompts shorter than their batch"
    alone = harvest_of(model, store, MIXED, hooks=hooks, batch_tokens=1)
    for hook, rows in rows_of(padded).items():
        expected = alone.read_rows(hook, 0, alone.n_rows)
        assert rows.shape == expected.shape
        assert np.abs(rows - expected).max() <= 1e-5 * np.abs(expected).max(), hook


def test_where_attention_sees_what_is_to_the_right_nothing_is_padded(store):
    fields = {**toy_model(store).native_config(), "attention_dir": "bidirectional"}

    def fill(work):
        from mi_pipe.models.trained import CONFIG_FILE, WEIGHTS_FILE, native_module

        work.write_json(CONFIG_FILE, fields)
        work.write_tensors(WEIGHTS_FILE, native_module(fields).state_dict())

    model = TrainedModel(publish(store, "train_model", "b1" * 8, fill, fields))
    whole = harvest_of(model, store, MIXED, hooks=[RESIDUAL], batch_tokens=2400)
    alone = harvest_of(model, store, MIXED, hooks=[RESIDUAL], batch_tokens=1)
    expected = rows_of(alone)[RESIDUAL]
    assert np.abs(rows_of(whole)[RESIDUAL] - expected).max() <= 1e-5 * np.abs(expected).max()


class ShortOfMemory:
    """A device that holds at most so many prompts at once, from a moment on: raised as torch does, within a module."""

    def __init__(self, most_prompts, after=0):
        self.most_prompts, self.after, self.n_raised = most_prompts, after, 0

    def install(self, monkeypatch):
        def load(*args, load=harvest.load_source):
            model = load(*args)
            model.submodule("layers.0").register_forward_pre_hook(self.check)
            return model

        monkeypatch.setattr(harvest, "load_source", load)

    def check(self, _module, args):
        self.after -= 1
        if args[0].shape[0] > self.most_prompts and self.after < 0:
            self.n_raised += 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.mark.parametrize("after", [2, 5])
def test_out_of_memory_halves_the_batches_and_says_so(tmp_path, monkeypatch, caplog, after):
    quarter = {"batch_tokens": 40 * 4, "shard_rows": 1024}
    # The first two passes measure precision on a sample of 8 prompts; the memory runs short after some shards.
    memory = ShortOfMemory(most_prompts=4, after=after)
    memory.install(monkeypatch)
    with caplog.at_level(logging.WARNING):
        acts = harvest_toy(Store(tmp_path / "short"), [40] * 64, batch_tokens=40 * 16, shard_rows=1024)
    assert memory.n_raised == 2
    assert [record.getMessage()[:70] for record in caplog.records if "batch" in record.getMessage().lower()] == [
        "A batch of 16 prompts of 40 tokens does not fit into the device's memory"[:70],
        "A batch of 8 prompts of 40 tokens does not fit into the device's memory"[:70],
    ]
    assert (acts.summary["halvings"], acts.manifest.n_launches) == (2, 1)
    monkeypatch.undo()
    whole = harvest_toy(Store(tmp_path / "whole"), [40] * 64, **quarter)
    for hook, rows in rows_of(whole).items():
        np.testing.assert_array_equal(acts.read_rows(hook, 0, acts.n_rows), rows)


def test_a_continued_harvest_begins_with_the_halves(tmp_path, monkeypatch):
    memory = ShortOfMemory(most_prompts=8, after=2)
    memory.install(monkeypatch)
    fields = {"batch_tokens": 40 * 16, "shard_rows": 1024}
    whole = tree_hashes(harvest_toy(Store(tmp_path / "whole"), [40] * 64, **fields))
    memory.after, memory.n_raised = 2, 0
    original, budget = ForwardPass.start, [5]

    def start_within_budget(self, batch):
        budget[0] -= 1
        if budget[0] == 0:
            raise KeyboardInterrupt
        return original(self, batch)

    monkeypatch.setattr(ForwardPass, "start", start_within_budget)
    store = Store(tmp_path / "stopped")
    with pytest.raises(KeyboardInterrupt):
        harvest_toy(store, [40] * 64, **fields)
    assert memory.n_raised == 1
    memory.after = -1
    acts = harvest_toy(store, [40] * 64, **fields)
    assert memory.n_raised == 1, "the second launch never tried the whole batches"
    assert tree_hashes(acts) == whole


def test_a_single_prompt_that_does_not_fit_is_one_clear_sentence(store, monkeypatch):
    ShortOfMemory(most_prompts=0, after=2).install(monkeypatch)
    with pytest.raises(BatchTooLargeError, match=r"^A batch of 1 prompts of 40 tokens does not fit"):
        harvest_toy(store, [40] * 64, batch_tokens=40, shard_rows=1024)


def test_batches_started_ahead_give_the_same_bytes(tmp_path, monkeypatch):
    lengths = [20] * 30 + [33, 7, 7, 20, 64, 1, 40] * 4
    whole = tree_hashes(harvest_toy(Store(tmp_path / "whole"), lengths))
    original, started = ForwardPass.__init__, []

    def ahead(self, *args):
        original(self, *args)
        self.n_ahead = 2

    start = ForwardPass.start
    monkeypatch.setattr(ForwardPass, "__init__", ahead)
    monkeypatch.setattr(ForwardPass, "start", lambda self, batch: (started.append(batch.number), start(self, batch))[1])
    assert tree_hashes(harvest_toy(Store(tmp_path / "ahead"), lengths)) == whole
    assert len(started) == len(set(started)), "no batch is run twice"
