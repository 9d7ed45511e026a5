"""Any torch module can be harvested: rows are what hooks see, cached by content, continued after a kill."""

import numpy as np
import pytest
import torch
import xarray as xr
from torch import nn

import mi_pipe
from mi_pipe.activations.harvest.capture import capture
from mi_pipe.activations.harvest.item_pass import ItemPass
from mi_pipe.core.errors import ConfigError, HookPointError, StageError
from mi_pipe.core.store import Store
from tests.activations.harvests import tree_hashes


class ToyOfSuperposition(nn.Module):
    """Elhage et al. 2022: ReLU(Wᵀ W x + b), with dropout to see that it is run in evaluation mode."""

    def __init__(self, n_features=20, n_hidden=5, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.down = nn.Linear(n_features, n_hidden, bias=False)
        self.up = nn.Sequential(nn.Linear(n_hidden, n_features), nn.Dropout(0.5), nn.ReLU())
        self.loss = nn.Linear(n_features, 1)  # never used

    def forward(self, x):
        return self.up(self.down(x)), x


INPUTS = torch.rand(1000, 20, generator=torch.Generator().manual_seed(1))
HOOKS = ["up.{0,2}", "down", "up.1.input"]
NAMES = ["up.0", "up.2", "down", "up.1.input"]


def expected(module, inputs):
    with torch.no_grad():
        down = inputs @ module.down.weight.T
        up = down @ module.up[0].weight.T + module.up[0].bias
    return {"down": down, "up.0": up, "up.1.input": up, "up.2": up.relu()}


def test_rows_are_the_items_values_whatever_the_batches(store):
    module = ToyOfSuperposition().train()
    acts = capture(module, INPUTS, HOOKS, store, batch_rows=96, shard_rows=64)
    assert acts.hooks == NAMES
    for hook, values in expected(module, INPUTS).items():
        np.testing.assert_allclose(acts.read_rows(hook, 0, acts.n_rows), values, rtol=1e-5, atol=1e-6)
    assert module.training, "left as it was"
    assert module.up[1].training


def test_the_artifact_is_a_store_like_any_other(store):
    acts = capture(ToyOfSuperposition(), INPUTS.numpy(), ["down"], store, store_dtype="float16", label="superposition")
    again = mi_pipe.open(acts.id, store)
    assert type(again) is type(acts)
    table = again.table()
    np.testing.assert_array_equal(table["row"], np.arange(1000))
    np.testing.assert_array_equal(table["prompt_idx"], np.arange(1000))
    assert set(table["token_id"]) == {-1}
    assert set(table["pos"]) == {0}
    assert set(table["text"]) == {""}
    assert again.n_prompts == 1000
    np.testing.assert_allclose(again.statistics("down").mean, again.read_rows("down", 0, 1000).mean(0), atol=1e-4)
    dataset = xr.open_zarr(again.group_path, consolidated=False)
    assert dataset["down"].dims == ("token", "width_5")
    assert again.to_pandas("down", where="prompt_idx < 3").shape[0] == 3
    again.check()


def test_it_is_computed_once_for_the_same_weights_and_inputs(store, monkeypatch):
    first = capture(ToyOfSuperposition(), INPUTS, ["down"], store)
    with monkeypatch.context() as patched:
        patched.setattr(ItemPass, "start", lambda *_: pytest.fail("run again"))
        assert capture(ToyOfSuperposition(), INPUTS.clone(), ["down"], store).id == first.id
    others = [
        capture(ToyOfSuperposition(seed=1), INPUTS, ["down"], store),
        capture(ToyOfSuperposition(), INPUTS[:999], ["down"], store),
        capture(ToyOfSuperposition(), INPUTS, ["down"], store, store_dtype="float16"),
    ]
    assert len({first.id, *(acts.id for acts in others)}) == 4


def test_stopped_in_the_middle_it_goes_on_and_ends_with_the_same_bytes(tmp_path, monkeypatch):
    options = {"batch_rows": 50, "shard_rows": 64}
    whole = capture(ToyOfSuperposition(), INPUTS, HOOKS, Store(tmp_path / "whole"), **options)
    original, started = ItemPass.start, []

    def stop_after(self, batch, most=8):
        started.append(batch.number)
        if len(started) == most:
            raise KeyboardInterrupt
        return original(self, batch)

    monkeypatch.setattr(ItemPass, "start", stop_after)
    with pytest.raises(KeyboardInterrupt):
        capture(ToyOfSuperposition(), INPUTS, HOOKS, tmp_path / "stopped", **options)
    acts = capture(ToyOfSuperposition(), INPUTS, HOOKS, tmp_path / "stopped", **options)
    assert acts.manifest.n_launches == 2
    assert len(started) < 8 + 20, "shards that were committed are not made again"
    assert tree_hashes(acts) == tree_hashes(whole)


def test_sequences_and_other_shapes_are_stored_flat(store):
    convolution = nn.Sequential(nn.Conv1d(3, 4, 3, padding=1), nn.Flatten(), nn.Linear(4 * 7, 2))
    inputs = torch.rand(50, 3, 7)
    acts = capture(convolution, inputs, ["0", "2"], store)
    assert acts.array("0").layout.token_shape == (4, 7)
    with torch.no_grad():
        np.testing.assert_allclose(acts.read_rows("0", 0, 50), convolution[0](inputs).flatten(1), atol=1e-6)


@pytest.mark.parametrize(
    ("hooks", "options", "error", "message"),
    [
        (["dwon"], {}, HookPointError, "no hook point 'dwon'. Did you mean 'down'"),
        (["up.3"], {}, HookPointError, "Did you mean"),
        (["loss"], {}, HookPointError, "no hook point 'loss'"),
        (["down"], {"shard_rows": 100}, ConfigError, "power of two"),
        (["down"], {"store_type": "float16"}, ValueError, "store_type"),
    ],
)
def test_what_cannot_work_is_refused(store, hooks, options, error, message):
    with pytest.raises(error, match=message):
        capture(ToyOfSuperposition(), INPUTS, hooks, store, **options)


def test_no_items_and_values_too_large_are_refused(store):
    with pytest.raises(ConfigError, match="no inputs"):
        capture(ToyOfSuperposition(), INPUTS[:0], ["down"], store)
    with pytest.raises(StageError, match="set store_dtype: bfloat16"):
        capture(ToyOfSuperposition(), INPUTS * 1e7, ["down"], store, store_dtype="float16")
