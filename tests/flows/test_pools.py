"""Dask workers share a harvest: real processes, in any order, one of them killed, and the bytes stay the same."""

import os
import signal
import threading
import time

import pytest

from flows.pools import DaskPool, cluster
from mi_pipe.activations.store import ActivationStore
from mi_pipe.core.errors import ConfigError
from mi_pipe.core.stage import execute
from mi_pipe.core.store import Store
from stages import harvest
from tests.activations.harvests import HEADS, RESIDUAL, harvest_toy, random_prompts, tree_hashes
from tests.stages.toys import toy_model

LENGTHS = [20] * 60 + [33, 7, 7, 20, 64, 1, 40] * 8


@pytest.fixture(scope="module")
def address():
    with cluster(2, None) as address:
        yield address


@pytest.fixture
def pool(address):
    pool = DaskPool(address)
    yield pool
    pool.close()


def harvest_in(pool, store):
    config = harvest.HarvestConfig(hooks=[RESIDUAL, HEADS], shard_rows=64, batch_tokens=96, device="cpu")
    inputs = harvest.Inputs(toy_model(store), random_prompts(store, LENGTHS))
    return ActivationStore(execute(harvest.STAGE, config, inputs, store, pool=pool).artifact.path)


def test_two_processes_make_the_bytes_of_one(tmp_path, store, pool):
    assert pool.n_workers == 2
    found = harvest_in(pool, store)
    alone = harvest_toy(Store(tmp_path / "alone"), LENGTHS)
    assert tree_hashes(found) == tree_hashes(alone)
    assert found.digest == alone.digest


def _pid_after(seconds):
    time.sleep(seconds)
    return os.getpid()


def test_results_come_from_several_processes_as_they_are_ready(pool):
    pids = list(pool.run(_pid_after, [0.5, 0.5, 0.01, 0.01]))
    assert len(pids) == 4
    assert len(set(pids)) == 2
    assert os.getpid() not in pids


def _divide(x):
    return 1 / x


def test_what_a_worker_raises_is_raised_here(pool):
    with pytest.raises(ZeroDivisionError):
        list(pool.run(_divide, [1, 0]))


def test_a_lost_worker_costs_time_and_no_rows(tmp_path):
    alone = harvest_toy(Store(tmp_path / "alone"), LENGTHS)
    with cluster(2, None) as address:
        pool = DaskPool(address)
        victim = next(iter(pool.run(_pid_after, [0.0])))
        killer = threading.Timer(1.0, os.kill, (victim, signal.SIGKILL))
        killer.start()
        found = harvest_in(pool, Store(tmp_path / "hurt"))
        killer.join()
        pool.close()
    assert found.digest == alone.digest


def test_no_scheduler_is_one_sentence():
    with pytest.raises(ConfigError, match=r"No Dask scheduler answers at 'tcp://127\.0\.0\.1:9'"):
        DaskPool("tcp://127.0.0.1:9")
