"""The harvest stage: same bytes after any kill, clear refusals before the model loads."""

import json
import os
import random
import re
import signal
import time

import numpy as np
import pytest
import torch

from mi_pipe.activations.harvest import filling
from mi_pipe.activations.harvest.forward import ForwardPass
from mi_pipe.activations.harvest.writer import StorageOverflowError
from mi_pipe.activations.store import ActivationStore
from mi_pipe.core.errors import ConfigError, HookPointError, PromptError, StageError
from mi_pipe.core.stage import execute
from mi_pipe.core.store import Store
from mi_pipe.models.handle import resolve_model
from mi_pipe.models.source import load_source
from stages import harvest
from tests.activations.harvests import HEADS, RESIDUAL, harvest_toy, random_prompts, tree_hashes
from tests.models.tiny import save_tiny_llama
from tests.stages.toys import publish, toy_model

LENGTHS = [20] * 30 + [33, 7, 7, 20, 64, 1, 40] * 4


def inputs_of(store, lengths=LENGTHS, d_vocab=64):
    return harvest.Inputs(toy_model(store), random_prompts(store, lengths, d_vocab))


def config_of(**fields):
    return harvest.HarvestConfig(**{"hooks": [RESIDUAL], "shard_rows": 64, "device": "cpu", **fields})


def test_the_group_and_beside_it_are_as_documented(store):
    acts = harvest_toy(store, LENGTHS)
    names = set(acts.manifest.files)
    n_shards = -(-acts.n_rows // 64)
    for name in ("tokens.parquet", "prompts.parquet", "statistics.safetensors", "precision.json"):
        assert name in names
    for shard in range(n_shards):
        record = json.loads((acts.path / f"commits/{shard:06d}.json").read_text())
        assert set(record) == {"shard", "rows", "plan", "files"}
        for key, (size, checksum) in record["files"].items():
            entry = acts.manifest.files[f"activations.zarr/{key}"]
            assert (entry.size_bytes, entry.checksum) == (size, checksum)
    assert acts.summary["n_shards"] == n_shards == acts.manifest.summary["n_shards"]
    estimate = harvest.estimate(config_of(hooks=[RESIDUAL, HEADS]), inputs_of(store))
    assert estimate.n_units == n_shards
    assert estimate.size_bytes > sum(
        (acts.path / key).stat().st_size for key in names if "/c/" in key and "hook" in key
    )


def test_it_is_done_once(store):
    inputs = inputs_of(store)
    outcomes = [execute(harvest.STAGE, config_of(), inputs, store).outcome for _ in range(2)]
    outcomes.append(execute(harvest.STAGE, config_of(batch_tokens=64), inputs, store).outcome)
    assert outcomes == ["Completed", "Cached", "Completed"]


class _Stop(Exception):
    pass


def test_stopped_after_any_number_of_batches_it_ends_with_the_same_bytes(tmp_path, monkeypatch):
    whole = tree_hashes(harvest_toy(Store(tmp_path / "whole"), LENGTHS))
    original, budget = ForwardPass.start, [0]

    def start_within_budget(self, batch):
        budget[0] -= 1
        if budget[0] < 0:
            raise _Stop
        return original(self, batch)

    monkeypatch.setattr(ForwardPass, "start", start_within_budget)
    n_launches, store = 0, Store(tmp_path / "stopped")
    while True:
        n_launches += 1
        budget[0] = 6 + n_launches % 3
        try:
            acts = harvest_toy(store, LENGTHS)
            break
        except _Stop:
            continue
    assert n_launches > 3
    assert acts.manifest.n_launches == n_launches
    assert tree_hashes(acts) == whole
    acts.check()


def filled_and_unfinished(root, monkeypatch):
    """Stop a harvest when every shard is committed and nothing else is written; return its store and its folder."""
    store = Store(root)
    monkeypatch.setattr(harvest, "finish", lambda *_: (_ for _ in ()).throw(_Stop()))
    with pytest.raises(_Stop):
        harvest_toy(store, LENGTHS)
    monkeypatch.undo()
    (folder,) = (store.root / "harvest").iterdir()
    return store, folder


def test_shards_whose_files_or_records_are_gone_are_made_again(tmp_path, monkeypatch):
    whole = tree_hashes(harvest_toy(Store(tmp_path / "whole"), LENGTHS))
    store, folder = filled_and_unfinished(tmp_path / "hurt", monkeypatch)
    (folder / "commits/000001.json").write_text('{"shard": 1, "ro')
    (folder / "activations.zarr" / RESIDUAL / "c/3/0").unlink()
    (folder / "activations.zarr" / HEADS / "c/5/0").write_bytes(b"torn")
    (store.scratch(folder.name) / "sums/000007.safetensors").write_bytes(b"torn")
    ran = []
    monkeypatch.setattr(
        filling,
        "harvest_shards",
        lambda plan, f, w, done, on, go=filling.harvest_shards: (ran.append(set(done)), go(plan, f, w, done, on)),
    )
    assert tree_hashes(harvest_toy(store, LENGTHS)) == whole
    n_shards = len([name for name in whole if name.startswith("commits/")])
    assert ran == [set(range(n_shards)) - {1, 3, 5}], "sums that are torn are made from the stored rows"


@pytest.mark.parametrize("metadata", ["zarr.json", f"{RESIDUAL}/zarr.json"])
def test_committed_shards_survive_damage_to_the_metadata_of_the_group(tmp_path, monkeypatch, metadata):
    whole = tree_hashes(harvest_toy(Store(tmp_path / "whole"), LENGTHS))
    store, folder = filled_and_unfinished(tmp_path / "hurt", monkeypatch)
    (folder / "activations.zarr" / "zarr.json").write_text("{")
    (folder / "activations.zarr" / metadata).write_text("{")
    monkeypatch.setattr(filling, "harvest_shards", lambda *_: pytest.fail("a shard was computed again"))
    assert tree_hashes(harvest_toy(store, LENGTHS)) == whole


def start_child(root):
    """Harvest in a forked process, which costs no imports; return its id."""
    pid = os.fork()
    if pid == 0:
        try:
            harvest_toy(Store(root), [25] * 1200, batch_tokens=150, shard_rows=512)
        finally:
            os._exit(0)
    return pid


def is_running(pid):
    return os.waitpid(pid, os.WNOHANG)[0] == 0


def test_killed_at_random_moments_it_ends_with_the_same_bytes(tmp_path):
    whole = harvest_toy(Store(tmp_path / "whole"), [25] * 1200, batch_tokens=150, shard_rows=512)
    rng, n_kills, killed = random.Random(0), 0, tmp_path / "killed"
    for _ in range(8):
        child = start_child(killed)
        time.sleep(rng.uniform(0.05, 0.6))
        if not is_running(child):
            break
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        n_kills += 1
    assert n_kills >= 1
    again = harvest_toy(Store(killed), [25] * 1200, batch_tokens=150, shard_rows=512)
    assert tree_hashes(again) == tree_hashes(whole)
    assert again.digest == whole.digest
    again.check()


def test_bos_is_left_out_unless_asked_for_and_a_llama_equals_its_bridge(tmp_path, store):
    save_tiny_llama(tmp_path / "llama")
    model = resolve_model(str(tmp_path / "llama"), store, device="cpu")
    prompts = random_prompts(store, [12] * 9, d_vocab=50)
    ids = prompts.token_ids.reshape(9, 12)
    hooks = ["blocks.{0,1}.hook_resid_post", "blocks.1.attn.hook_z", "blocks.0.ln1.hook_normalized"]
    _, cache = load_source(model, "cpu").bridge.run_with_cache(torch.tensor(ids).long())
    for keep_bos, n_rows in ((True, 108), (False, 107)):
        config = config_of(hooks=hooks, keep_bos=keep_bos, precision="float32", store_dtype="float32")
        acts = ActivationStore(execute(harvest.STAGE, config, harvest.Inputs(model, prompts), store).artifact.path)
        assert acts.n_rows == n_rows, "the first prompt begins with token 0, which is BOS"
        for hook in acts.hooks:
            expected = cache[hook].flatten(2).flatten(0, 1).numpy()[108 - n_rows :]
            found = acts.read_rows(hook, 0, n_rows)
            assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


def test_precision_is_measured_against_float32(store):
    exact = harvest_toy(store, [40] * 20, precision="float32", store_dtype="float32")
    assert {item["relative_error"] for item in exact.precision["hooks"].values()} == {0.0}
    stored = harvest_toy(store, [40] * 20, precision="float32")
    mixed = harvest_toy(store, [40] * 20, precision="mixed")
    assert 0 < stored.precision["hooks"][RESIDUAL]["fvu_added"] < 1e-6
    assert 1e-6 < mixed.precision["hooks"][RESIDUAL]["fvu_added"] < 1e-2


def huge_model(store, scale=1e7):
    """The toy with a residual stream beyond float16."""
    from safetensors.torch import load_file

    from mi_pipe.models.trained import CONFIG_FILE, WEIGHTS_FILE, TrainedModel

    toy = toy_model(store)
    weights = load_file(toy.file(WEIGHTS_FILE))
    embedding = next(name for name in weights if "embed" in name)
    weights[embedding] = weights[embedding].clone()
    weights[embedding][5] *= scale

    def fill(work):
        work.write_json(CONFIG_FILE, toy.native_config())
        work.write_tensors(WEIGHTS_FILE, weights)

    return TrainedModel(publish(store, "train_model", "b" * 16, fill, {}))


@pytest.mark.parametrize("everywhere", [True, False])
def test_values_beyond_float16_are_refused_with_the_remedy_or_stored_as_bfloat16(store, everywhere, monkeypatch):
    # Either the sample finds them before the work begins, or (sample too small) the shard that holds them does.
    monkeypatch.setattr(harvest, "_SAMPLE_PROMPTS", 100 if everywhere else 1)
    inputs = harvest.Inputs(huge_model(store), random_prompts(store, [1] + [40] * 20))
    with pytest.raises(StageError, match=r"hook_resid_post.*bfloat16") as refusal:
        execute(harvest.STAGE, config_of(), inputs, store)
    assert isinstance(refusal.value, StorageOverflowError)
    assert everywhere or "shard" in str(refusal.value)
    result = execute(harvest.STAGE, config_of(on_overflow="bfloat16"), inputs, store)
    direct = execute(harvest.STAGE, config_of(store_dtype="bfloat16"), inputs, store)
    acts = ActivationStore(result.artifact.path)
    assert acts.dtype == "bfloat16"
    assert tree_hashes(acts) == tree_hashes(ActivationStore(direct.artifact.path))
    assert "hook_resid_post" in acts.summary["overflow"]
    assert everywhere or re.match(r"\d+ of rows 0 to 64 \(shard 0\)", acts.summary["overflow"])
    assert direct.artifact.summary["overflow"] == ""
    assert np.isfinite(acts.read_rows(RESIDUAL, 0, acts.n_rows)).all()


@pytest.mark.parametrize(
    ("fields", "lengths", "d_vocab", "error", "message"),
    [
        ({"hooks": ["blocks.0.hook_resid_pots"]}, [8], 64, HookPointError, "hook_resid_post"),
        ({"hooks": ["blocks.9.hook_resid_post"]}, [8], 64, HookPointError, "layers 0 to 1"),
        ({"hooks": ["blocks.0.attn.hook_attn_scores"]}, [8], 64, HookPointError, "no value at each token"),
        ({"hooks": ["blocks.0.attn.hook_pattern"]}, [8, 7], 64, HookPointError, "need the same length.* 7 to 8"),
        ({"positions": "tokn == ' 7'"}, [8], 64, ConfigError, "Did you mean 'token'"),
        ({"positions": "pos > 8"}, [8], 64, PromptError, "no token to store"),
        ({"shard_rows": 100}, [8], 64, ConfigError, "power of two"),
        ({}, [8, 70], 64, PromptError, "70 tokens; the model takes at most 64"),
        ({}, [8], 900, PromptError, "vocabulary ends at 63"),
    ],
)
def test_what_cannot_work_is_refused_before_the_model_loads(
    store, monkeypatch, fields, lengths, d_vocab, error, message
):
    monkeypatch.setattr(harvest, "load_source", lambda *_: pytest.fail("the model was loaded"))
    inputs = inputs_of(store, lengths, d_vocab) if d_vocab == 64 else inputs_with_large_tokens(store)
    for ask in (
        lambda: harvest.estimate(config_of(**fields), inputs),
        lambda: execute(harvest.STAGE, config_of(**fields), inputs, store),
    ):
        with pytest.raises(error, match=message):
            ask()


def inputs_with_large_tokens(store):
    return harvest.Inputs(toy_model(store), random_prompts(store, [8], d_vocab=900))


@pytest.mark.real_model
def test_smollm2_in_float32_equals_the_bridge(smollm2, store):
    hooks = ["blocks.{0,9}.hook_resid_post", "blocks.9.attn.hook_z", "blocks.9.hook_mlp_out", "blocks.9.mlp.hook_post"]
    prompts = random_prompts(store, [32] * 4, d_vocab=49_000)
    config = config_of(hooks=hooks, precision="float32", store_dtype="float32", massive_factor=1e6)
    acts = ActivationStore(execute(harvest.STAGE, config, harvest.Inputs(smollm2, prompts), store).artifact.path)
    ids = torch.tensor(prompts.token_ids.reshape(4, 32)).long()
    _, cache = load_source(smollm2, "cpu").bridge.run_with_cache(ids, stop_at_layer=10, return_type=None)
    kept = ids.flatten().numpy() != load_source(smollm2, "cpu").vocabulary.bos_id
    kept |= np.arange(128) % 32 > 0
    for hook in acts.hooks:
        expected = cache[hook].flatten(2).flatten(0, 1).numpy()[kept]
        assert np.abs(acts.read_rows(hook, 0, acts.n_rows) - expected).max() <= 1e-5 * np.abs(expected).max(), hook
