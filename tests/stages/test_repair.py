"""Repair ends with the bytes that were published, whatever was damaged, and takes no others."""

import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch

import mi_pipe
from mi_pipe.activations.harvest.collecting import PendingRows
from mi_pipe.activations.harvest.forward import ForwardPass
from mi_pipe.core.errors import ArtifactIncompleteError, ArtifactLockedError, ModelError, StageError
from mi_pipe.core.lock import exclusive_lock
from mi_pipe.core.manifest import read_manifest, write_manifest
from mi_pipe.core.place import open_place
from mi_pipe.core.stage import execute
from mi_pipe.core.store import Store
from mi_pipe.models.handle import resolve_model
from mi_pipe.verifying import verify
from stages import harvest, heads
from stages.repair.repair import repair
from tests.activations.harvests import HEADS, RESIDUAL, harvest_toy, tree_hashes
from tests.models.tiny import save_tiny_llama

LENGTHS = [20] * 20 + [33, 7, 7, 20, 64, 1, 40] * 2
SHARD = f"activations.zarr/{RESIDUAL}/c/3/0"


def flip(path, at=0.5, bit=3):
    data = bytearray(path.read_bytes())
    data[int(at * (len(data) - 1))] ^= 1 << bit
    path.chmod(0o644)
    path.write_bytes(data)
    path.chmod(0o444)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    torch.set_num_threads(1)
    store = Store(tmp_path_factory.mktemp("made"))
    return store, harvest_toy(store, LENGTHS)


def ran(monkeypatch):
    """Record how many batches run."""
    batches, original = [], ForwardPass.start
    monkeypatch.setattr(
        ForwardPass, "start", lambda self, batch: (batches.append(batch.number), original(self, batch))[1]
    )
    return batches


def a_file_of_each_kind(acts):
    """Return one file of every folder of the artifact."""
    return list({str(Path(name).parent) + Path(name).suffix: name for name in acts.manifest.files}.values())


def test_a_file_of_every_kind_can_be_mended(made):
    store, acts = made
    whole, manifest = tree_hashes(acts), (acts.path / "manifest.json").read_bytes()
    for i, name in enumerate([*a_file_of_each_kind(acts), "manifest.json"]):
        (flip, os.unlink)[i % 2](acts.path / name)
        assert not verify(acts.id, store, deep=True).is_whole, name
        done = repair(acts.id, store)
        assert (done.outcome, done.mended) == ("mended", (name,))
        assert tree_hashes(acts) == whole
        assert (acts.path / "manifest.json").read_bytes() == manifest
    assert verify(acts.id, store, deep=True).is_whole
    assert not any((store.root / ".repair").iterdir())
    assert all((acts.path / name).stat().st_mode & 0o777 == 0o444 for name in acts.manifest.files)
    assert repair(acts.id, store).outcome == "whole"


def test_only_batches_with_rows_in_damaged_shards_run(made, monkeypatch):
    store, acts = made
    batches = ran(monkeypatch)
    flip(acts.path / SHARD)
    repair(acts.id[:14], store)
    config = harvest.HarvestConfig(hooks=[RESIDUAL, HEADS], shard_rows=64, batch_tokens=96, device="cpu")
    inputs = harvest.Inputs(
        mi_pipe.open(acts.inputs["model"].id, store), mi_pipe.open(acts.inputs["prompts"].id, store)
    )
    plan = harvest.make_plan(config, inputs, harvest.Fallback("float16"))
    assert sorted(batches) == plan.batches_of(3)
    batches.clear()
    for name in ("tokens.parquet", "prompts.parquet", "statistics.safetensors", "activations.zarr/pos/c/1"):
        flip(acts.path / name)
    repair(acts.id, store)
    assert batches == []


def test_many_files_damaged_at_once_come_back(made):
    store, acts = made
    whole = tree_hashes(acts)
    rng = random.Random(0)
    names = rng.sample(sorted(acts.manifest.files), 25)
    for name in names:
        flip(acts.path / name, rng.random(), rng.randrange(8))
    flip(acts.path / "manifest.json", 0.9)
    done = repair(acts.id, store)
    assert set(done.mended) == {*names, "manifest.json"}
    assert tree_hashes(acts) == whole


def test_killed_at_random_moments_it_stays_damaged_and_mends_in_the_end(made):
    store, acts = made
    whole, rng, n_kills = tree_hashes(acts), random.Random(1), 0
    names = [name for name in acts.manifest.files if "/c/" in name or name.endswith("parquet")]
    for name in names:
        flip(acts.path / name)
    while not verify(acts.id, store, deep=True).is_whole:
        child = os.fork()
        if child == 0:
            try:
                repair(acts.id, store)
            finally:
                os._exit(0)
        time.sleep(rng.uniform(0.0, 0.4 + 0.1 * n_kills))
        if os.waitpid(child, os.WNOHANG)[0] == 0:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            n_kills += 1
    assert n_kills >= 2
    assert repair(acts.id, store).outcome == "whole"
    assert tree_hashes(acts) == whole
    assert not store.repair_folder(acts.id).exists()


def test_bytes_that_come_out_otherwise_are_not_taken(made, monkeypatch):
    store, acts = made
    whole = tree_hashes(acts)
    flip(acts.path / SHARD)
    hurt = tree_hashes(acts)
    original = PendingRows.result
    monkeypatch.setattr(
        PendingRows, "result", lambda self: {hook: rows + rows.dtype.type(1) for hook, rows in original(self).items()}
    )
    with pytest.raises(StageError, match=rf"{SHARD} came out with other bytes than were published.*mi-pipe rm"):
        repair(acts.id, store)
    assert tree_hashes(acts) == hurt, "nothing was changed"
    monkeypatch.undo()
    repair(acts.id, store)
    assert tree_hashes(acts) == whole


def test_a_lost_or_changed_input_is_said(made, tmp_path):
    store, acts = made
    flip(acts.path / SHARD)
    prompts = store.folder(acts.inputs["prompts"].id)
    original = read_manifest(prompts)
    write_manifest(prompts, original.model_copy(update={"digest": "0" * 64}))
    with pytest.raises(StageError, match=r"its input prompts .* is not what it was.*mi-pipe rm"):
        repair(acts.id, store)
    (prompts / "manifest.json").rename(tmp_path / "aside")
    with pytest.raises(StageError, match="is not in"):
        repair(acts.id, store)
    write_manifest(prompts, original)
    repair(acts.id, store)


def test_it_holds_the_lock(made):
    store, acts = made
    flip(acts.path / SHARD)
    with exclusive_lock(store.lock_path(acts.id), acts.id), pytest.raises(ArtifactLockedError):
        repair(acts.id, store)
    repair(acts.id, store)


def test_other_artifacts_are_made_again_apart(store):
    save_tiny_llama(store.root / "llama")
    model = resolve_model(str(store.root / "llama"), store, device="cpu")
    config = heads.HeadsConfig(n_sequences=2, period=10, device="cpu")
    artifact = execute(heads.STAGE, config, heads.Inputs(model, []), store).artifact
    assert artifact.manifest.sources["model"]["name"] == str(store.root / "llama")
    whole = {name: (artifact.path / name).read_bytes() for name in artifact.manifest.files}
    for name in whole:
        flip(artifact.path / name)
    (store.root / "llama").rename(store.root / "moved")
    with pytest.raises(ModelError, match="llama"):
        repair(artifact.id, store)
    assert set(repair(artifact.id, store, model=str(store.root / "moved")).mended) == set(whole)
    assert {name: (artifact.path / name).read_bytes() for name in whole} == whole


def test_an_unfinished_harvest_is_finished_without_its_recipe(tmp_path, made, monkeypatch):
    _, acts = made
    store, budget, original = Store(tmp_path / "unfinished"), [9], ForwardPass.start

    def start_within_budget(self, batch):
        budget[0] -= 1
        if budget[0] == 0:
            raise KeyboardInterrupt
        return original(self, batch)

    monkeypatch.setattr(ForwardPass, "start", start_within_budget)
    with pytest.raises(KeyboardInterrupt):
        harvest_toy(store, LENGTHS)
    with pytest.raises(ArtifactIncompleteError, match=r"\d+ of \d+ .*mi-pipe repair harvest"):
        mi_pipe.open(acts.id, store)
    assert repair(acts.id, store).outcome == "finished"
    assert mi_pipe.open(acts.id, store).digest == acts.digest


def test_a_manifest_without_a_copy_is_said(tmp_path):
    store = Store(tmp_path / "s")
    acts = harvest_toy(store, [8] * 4)
    store.manifest_copy(acts.id).unlink()
    flip(acts.path / "manifest.json")
    with pytest.raises(StageError, match=r"no whole copy of it.*mi-pipe rm"):
        repair(acts.id, store)


def test_a_harvest_in_an_object_store_is_mended_there(tmp_path, bucket):
    store = Store(tmp_path / "s")
    acts = harvest_toy(store, LENGTHS, destination=bucket)
    place = open_place(f"{bucket}/harvest/{acts.id}")
    whole = {name: place.read(name) for name in [*place.keys()]}
    for name in (SHARD, "tokens.parquet", "manifest.json", "commits/000002.json"):
        place.write(name, whole[name][:-1] + b"?")
    flip(acts.path / "statistics.safetensors")
    found = verify(acts.id, store, deep=True)
    assert {damage.file for damage in found.damage} == {
        SHARD,
        "tokens.parquet",
        "manifest.json",
        "commits/000002.json",
        "statistics.safetensors",
    }
    assert not verify(f"{bucket}/harvest/{acts.id}", store, deep=True).is_whole
    repair(acts.id, store)
    assert {name: place.read(name) for name in [*place.keys()]} == whole
    assert verify(acts.id, store, deep=True).is_whole
    assert verify(f"{bucket}/harvest/{acts.id}", Store(tmp_path / "other"), deep=True).is_whole
