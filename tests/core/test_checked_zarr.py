"""A Zarr group of any artifact is read as it was published, or not at all."""

import shutil

import numpy as np
import pytest
import xarray as xr
import zarr

from mi_pipe.core import checksum
from mi_pipe.core.artifact import Artifact
from mi_pipe.core.errors import ArtifactDamagedError
from tests.stages.toys import publish


@pytest.fixture(params=["chunks", "shards"])
def artifact(request, store):
    def fill(work):
        group = zarr.open_group(work.path("effects.zarr"), mode="w", zarr_format=3)
        layout = {"chunks": (4, 3)} if request.param == "chunks" else {"chunks": (2, 3), "shards": (4, 3)}
        array = group.create_array("a", shape=(12, 3), dtype="float32", dimension_names=("row", "column"), **layout)
        array[:] = np.arange(36).reshape(12, 3)

    return Artifact(publish(store, "patch", "a" * 16, fill, {}))


def chunk(artifact, number):
    return artifact.path / f"effects.zarr/a/c/{number}/0"


def read_both_ways(artifact):
    checksum.forget()
    found = Artifact(artifact.path, artifact.manifest).zarr_group("effects.zarr")
    yield lambda: zarr.open_group(found, mode="r")["a"][:]
    yield lambda: zarr.open_group(found, mode="r")["a"][5:6]
    yield lambda: xr.open_zarr(found, consolidated=False)["a"].values


def test_a_whole_group_is_read(artifact):
    for read in read_both_ways(artifact):
        assert read()[0].tolist() in ([0, 1, 2], [15, 16, 17])


def remove(artifact):
    chunk(artifact, 1).unlink()


def empty(artifact):
    chunk(artifact, 1).unlink()
    chunk(artifact, 1).write_bytes(b"")


def exchange(artifact):
    for number, other in ((1, 2), (2, 1)):
        shutil.copy(chunk(artifact, number), artifact.path.parent / f"kept-{other}")
    for number in (1, 2):
        chunk(artifact, number).unlink()
        shutil.move(artifact.path.parent / f"kept-{number}", chunk(artifact, number))


def alter_metadata(artifact):
    path = artifact.path / "effects.zarr/a/zarr.json"
    path.chmod(0o644)
    path.write_bytes(path.read_bytes().replace(b"float32", b"float64", 1))


@pytest.mark.parametrize("damage", [remove, empty, exchange, alter_metadata])
def test_a_damaged_group_is_refused(artifact, damage):
    damage(artifact)
    for read in read_both_ways(artifact):
        with pytest.raises(ArtifactDamagedError, match=rf"{artifact.id} is damaged.*mi-pipe repair"):
            read()
