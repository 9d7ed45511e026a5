"""Shards are functions of the plan: filled in any order, twice, by several at once; who disagrees is told so."""

import threading

import pytest

from mi_pipe.activations.group import GROUP_NAME
from mi_pipe.activations.harvest import writer
from mi_pipe.activations.harvest.fallback import Fallback
from mi_pipe.activations.harvest.forward import ForwardPass
from mi_pipe.core.errors import StageError
from mi_pipe.core.place import LocalPlace
from mi_pipe.models.source import load_source
from stages import harvest
from tests.activations.harvests import HEADS, RESIDUAL, harvest_toy, random_prompts
from tests.stages.toys import toy_model

LENGTHS = [20] * 30 + [33, 7, 7, 20, 64, 1, 40] * 4
CONFIG = harvest.HarvestConfig(hooks=[RESIDUAL, HEADS], shard_rows=64, batch_tokens=96, device="cpu")


@pytest.fixture
def make_job(store, tmp_path):
    """Return a function that begins a harvest in a folder: its job, and a forward pass of its own."""
    inputs = harvest.Inputs(toy_model(store), random_prompts(store, LENGTHS))

    def make(name):
        place, scratch = LocalPlace(tmp_path / name), LocalPlace(tmp_path / f"{name}-scratch")
        job = harvest.make_job(CONFIG, inputs, place, scratch, Fallback("float16"))
        job.prepare(tmp_path / f"{name}-building", {"store_dtype": "float16"})
        model = load_source(inputs.model, "cpu", "float32")
        return job, ForwardPass(model, job.hooks, "float32", "float16")

    return make


def bytes_of(job):
    keys = [*job.place.keys(GROUP_NAME), *job.place.keys("commits")]
    return {key: job.place.read(key) for key in keys if key.endswith(".json") is key.startswith("commits")}


def test_backwards_and_one_by_one_gives_the_bytes_of_a_harvest(store, make_job):
    whole = harvest_toy(store, LENGTHS)
    job, forward = make_job("backwards")
    for shard in reversed(range(job.plan.layout.n_shards)):
        job.fill(forward, [shard])
    assert len(job.commits()) == job.plan.layout.n_shards
    written = bytes_of(job)
    assert written
    for key, data in written.items():
        if not key.startswith("commits"):
            assert data == (whole.path / key).read_bytes()


def test_two_at_once_on_the_same_shards_agree(make_job):
    (first, forward), (second, other) = make_job("shared"), make_job("shared")
    shards = list(range(first.plan.layout.n_shards))
    errors = []

    def fill(job, forward):
        try:
            job.fill(forward, shards)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=fill, args=pair) for pair in ((first, forward), (second, other))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    alone, its_forward = make_job("alone")
    alone.fill(its_forward, shards)
    assert bytes_of(first) == bytes_of(alone)


def test_a_shard_committed_with_other_bytes_is_left_alone_and_told(make_job):
    job, forward = make_job("conflict")
    job.fill(forward, [2])
    record = job.place.read("commits/000002.json")
    checksum = job.commits()[2].files[f"{RESIDUAL}/c/2/0"][1]
    other = checksum[:-1] + ("0" if checksum[-1] != "0" else "1")
    job.place.write("commits/000002.json", record.replace(checksum.encode(), other.encode()))
    before = bytes_of(job)
    with pytest.raises(StageError, match=r"Shard 2 in .* with other bytes"):
        job.fill(forward, [2])
    assert bytes_of(job) == before


def test_any_number_of_threads_writes_the_same_bytes(make_job, monkeypatch):
    (one, forward), (several, other) = make_job("one"), make_job("several")
    shards = range(one.plan.layout.n_shards)
    monkeypatch.setattr(writer, "_THREADS", 1)
    one.fill(forward, shards)
    monkeypatch.setattr(writer, "_THREADS", 3)
    several.fill(other, shards)
    assert bytes_of(several) == bytes_of(one)
