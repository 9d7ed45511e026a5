"""What a harvest stores: attention patterns, modules by their paths, and tokens at chosen positions."""

import numpy as np
import pytest
import torch
import xarray as xr

from mi_pipe.activations.store import ActivationStore
from mi_pipe.core.stage import execute
from mi_pipe.models.source import load_source
from stages import harvest
from tests.activations.harvests import RESIDUAL, random_prompts
from tests.stages.toys import toy_model

EXACT = {"device": "cpu", "precision": "float32", "store_dtype": "float32", "shard_rows": 64}


def harvested(store, prompts, **fields):
    inputs = harvest.Inputs(toy_model(store, attn_only=False), prompts)
    config = harvest.HarvestConfig(**{**EXACT, **fields})
    return ActivationStore(execute(harvest.STAGE, config, inputs, store).artifact.path)


def cached(store, prompts, n_pos):
    ids = torch.tensor(prompts.token_ids.reshape(-1, n_pos)).long()
    return load_source(toy_model(store, attn_only=False), "cpu").bridge.run_with_cache(ids)[1]


def assert_near(found, expected):
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


def test_a_row_of_a_pattern_is_a_query_with_all_heads_and_keys(store):
    prompts, hook = random_prompts(store, [12] * 20), "blocks.1.attn.hook_pattern"
    acts = harvested(store, prompts, hooks=[hook, RESIDUAL])
    layout = acts.array(hook).layout
    assert (layout.token_shape, layout.dimension) == ((4, 12), "head_key")
    cache = cached(store, prompts, 12)
    assert_near(acts.read_rows(hook, 0, 240), cache[hook].transpose(1, 2).flatten(2).flatten(0, 1).numpy())
    assert_near(acts.read_rows(RESIDUAL, 0, 240), cache[RESIDUAL].flatten(0, 1).numpy())
    queries = acts.read_rows(hook, 0, 240).reshape(240, 4, 12)
    np.testing.assert_allclose(queries.sum(-1), 1, rtol=1e-5)
    for row in range(12):
        assert (queries[row, :, row + 1 :] == 0).all(), "nothing is paid to what comes later"
    assert xr.open_zarr(acts.group_path, consolidated=False)[hook].dims == ("token", "head_key")


def test_modules_are_stored_by_their_paths(store):
    prompts = random_prompts(store, [9] * 20)
    hooks = ["layers.*.mlp", "layers.1.mlp.fc_out.input", "blocks.0.hook_mlp_out"]
    acts = harvested(store, prompts, hooks=hooks)
    assert acts.hooks == ["layers.0.mlp", "layers.1.mlp", "layers.1.mlp.fc_out.input", "blocks.0.hook_mlp_out"]
    cache = cached(store, prompts, 9)
    names = ["blocks.0.hook_mlp_out", "blocks.1.hook_mlp_out", "blocks.1.mlp.hook_post", "blocks.0.hook_mlp_out"]
    for hook, name in zip(acts.hooks, names, strict=True):
        assert_near(acts.read_rows(hook, 0, acts.n_rows), cache[name].flatten(0, 1).numpy())


@pytest.mark.parametrize(
    ("positions", "chosen"),
    [
        ("last", lambda table: table["pos"] == table["n_tokens"] - 1),
        ("every 4", lambda table: table["pos"] % 4 == 0),
        ("token == ' 7' or pos > 20", lambda table: (table["text"] == " 7") | (table["pos"] > 20)),
        ("n_tokens < 8", lambda table: table["n_tokens"] < 8),
    ],
)
def test_only_tokens_at_the_positions_become_rows(store, positions, chosen):
    lengths = [20] * 12 + [33, 7, 7, 20, 40] * 4
    prompts = random_prompts(store, lengths)
    whole = harvested(store, prompts, hooks=[RESIDUAL])
    some = harvested(store, prompts, hooks=[RESIDUAL], positions=positions)
    table = whole.table().assign(n_tokens=np.repeat(lengths, lengths))
    expected = table[chosen(table)]
    assert 0 < len(expected) < len(table)
    found = some.table()
    for column in ("prompt_idx", "pos", "token_id", "text"):
        assert list(found[column]) == list(expected[column])
    assert_near(some.read_rows(RESIDUAL, 0, some.n_rows), whole.take(RESIDUAL, expected["row"].to_numpy()))
    assert whole.id != some.id
