"""A disk that fills while a stage writes: one sentence, nothing published, and the same call goes on after."""

import contextlib
import dataclasses
import os
import resource
import subprocess
import sys

import pytest
import torch

from mi_pipe.core.errors import DiskSpaceError
from mi_pipe.core.full_disk import told_if_full
from mi_pipe.core.stage import execute
from mi_pipe.core.store import Store
from stages import harvest
from tests.activations.harvests import HEADS, RESIDUAL, harvest_toy, random_prompts, tree_hashes
from tests.core import counting_stage
from tests.stages.toys import toy_model

LENGTHS = [20] * 60 + [33, 7, 7, 20, 64, 1, 40] * 2
CONFIG = harvest.HarvestConfig(hooks=[RESIDUAL, HEADS], shard_rows=64, batch_tokens=96, device="cpu")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    torch.set_num_threads(1)
    acts = harvest_toy(Store(tmp_path_factory.mktemp("whole")), LENGTHS)
    return acts.digest, tree_hashes(acts)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("mounting a tmpfs needs to be root on Linux")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def filling(stage, ballast, n_left):
    """Return the stage, begun on a disk on which then only `n_left` bytes are left."""

    def run(config, inputs, work):
        with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))
        os.truncate(ballast, ballast.stat().st_size - n_left)
        return stage.run(config, inputs, work)

    return dataclasses.replace(stage, run=run)


# Where it ends: before the group, in it, in the middle of the shards, at the last, in the tables or the manifest.
@pytest.mark.parametrize("n_left", [0, 400_000, 700_000, 850_000, 950_000])
def test_a_harvest_on_a_full_disk_stops_in_one_sentence_and_goes_on(small_disk, whole, n_left):
    store = Store(small_disk / "store")
    inputs = harvest.Inputs(toy_model(store), random_prompts(store, LENGTHS))
    ballast = small_disk / "ballast"
    with pytest.raises(DiskSpaceError, match=r"^harvest-\w+ stopped: the disk of .* is full .*go on\.$") as refusal:
        execute(filling(harvest.STAGE, ballast, n_left), CONFIG, inputs, store)
    assert "\n" not in str(refusal.value)
    name = str(refusal.value).split()[0]
    assert not store.is_published(name)
    with pytest.raises(DiskSpaceError):
        execute(harvest.STAGE, CONFIG, inputs, store)
    ballast.unlink()
    n_done, has_begun = store.ledger(name).n_done, any(store.folder(name).iterdir())
    assert n_done > 0 or n_left < 700_000
    result = execute(harvest.STAGE, CONFIG, inputs, store)
    assert (result.outcome == "Resumed") == has_begun
    digest, hashes = whole
    assert result.artifact.digest == digest
    assert tree_hashes(result.artifact) == hashes


def test_every_other_stage_says_the_same(small_disk):
    store, ballast = Store(small_disk / "store"), small_disk / "ballast"
    stage, config = counting_stage.STAGE, counting_stage.CountingConfig(n=12)
    with pytest.raises(DiskSpaceError, match=r"^counting-\w+ stopped: the disk of .* is full"):
        execute(filling(stage, ballast, 8_000), config, counting_stage.Inputs(), store)
    ballast.unlink()
    assert execute(stage, config, counting_stage.Inputs(), store).artifact.summary["n"] == 12


def test_a_file_beyond_the_limit_of_the_process_is_said(store, whole):
    inputs = harvest.Inputs(toy_model(store), random_prompts(store, LENGTHS))
    config = CONFIG.model_copy(update={"shard_rows": 1024})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, before[1]))
    try:
        with pytest.raises(DiskSpaceError, match=r"a file would be larger than .*ulimit"):
            execute(harvest.STAGE, config, inputs, store)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    expected = harvest_toy(Store(store.root / "other"), LENGTHS, shard_rows=1024)
    result = execute(harvest.STAGE, config, inputs, store)
    assert result.outcome == "Resumed"
    assert result.artifact.digest == expected.digest


LIBRARIES = {
    "pyarrow": "import pandas as pd; pd.DataFrame({'a': range(99_999)}).to_parquet(path)",
    "safetensors": "import torch; from safetensors.torch import save_file; save_file({'a': torch.ones(99_999)}, path)",
    "numpy": "import numpy as np; np.save(path, np.ones(99_999))",
    "zarr": "import zarr, numpy as np; zarr.create_array(path, data=np.random.rand(99_999), compressors=None)",
    "h5py": "import h5py, numpy as np; f = h5py.File(path, 'w'); f['a'] = np.random.rand(99_999); f.close()",
}


@pytest.mark.parametrize("library", LIBRARIES)
def test_however_a_library_says_it(small_disk, library):
    (small_disk / "ballast").write_bytes(bytes(4_100_000))
    with pytest.raises(DiskSpaceError, match="this one stopped: the disk of"), told_if_full(small_disk, "this one"):
        exec(LIBRARIES[library], {"path": small_disk / "file"})


def test_other_errors_pass_as_they_are(tmp_path):
    with pytest.raises(ZeroDivisionError), told_if_full(tmp_path, "this one"):
        print(1 / 0, file=sys.stderr)
