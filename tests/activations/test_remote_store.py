"""A harvest written to an object store is the harvest of a folder, byte for byte, and is read from there."""

import numpy as np
import pytest
import xarray as xr

import mi_pipe
from mi_pipe.activations.store import ActivationStore
from mi_pipe.core.artifact import Artifact
from mi_pipe.core.errors import ArtifactDamagedError, ArtifactNotFoundError
from mi_pipe.core.place import open_place
from mi_pipe.core.store import Store
from tests.activations.harvests import HEADS, RESIDUAL, harvest_toy

LENGTHS = [20] * 30 + [33, 7, 7, 20, 64, 1, 40] * 4


@pytest.fixture
def local(store):
    return harvest_toy(store, LENGTHS)


def url_of(artifact: Artifact, bucket: str) -> str:
    return f"{bucket}/harvest/{artifact.id}"


def assert_reads_alike(found: ActivationStore, local: ActivationStore) -> None:
    assert found.digest == local.digest
    assert found.hooks == local.hooks
    for hook in local.hooks:
        np.testing.assert_array_equal(found.read_rows(hook, 0, local.n_rows), local.read_rows(hook, 0, local.n_rows))
    rows = np.array([5, 700, 3, 64])
    np.testing.assert_array_equal(found.take(HEADS, rows), local.take(HEADS, rows))
    assert found.table().equals(local.table())
    np.testing.assert_array_equal(found.statistics(RESIDUAL).mean, local.statistics(RESIDUAL).mean)


def test_the_bytes_in_the_object_store_are_those_of_a_folder(tmp_path, local, bucket):
    remote = harvest_toy(Store(tmp_path / "elsewhere"), LENGTHS, destination=bucket)
    assert remote.id == local.id, "where results go does not change what they are"
    assert not (remote.path / "activations.zarr").exists(), "the shards were never on this disk"
    place = open_place(url_of(local, bucket))
    assert set(place.keys()) == {*local.manifest.files, "manifest.json"}
    for name in local.manifest.files:
        assert place.read(name) == (local.path / name).read_bytes(), name
    assert list(open_place(f"{bucket}/.work").keys()) == []
    assert_reads_alike(remote, local)
    remote.check()


def test_it_opens_by_url_on_another_machine(tmp_path, local, bucket):
    harvest_toy(Store(tmp_path / "elsewhere"), LENGTHS, destination=bucket)
    found = mi_pipe.open(url_of(local, bucket), store=tmp_path / "third")
    assert isinstance(found, ActivationStore)
    assert_reads_alike(found, local)
    assert found.to_dask(RESIDUAL)[100:110].compute().shape == (10, 32)
    assert found.to_xarray()[RESIDUAL].isel(token=slice(0, 3)).values.shape == (3, 32)
    found.check()
    with pytest.raises(ArtifactNotFoundError, match=r"Nothing is published at s3://"):
        mi_pipe.open(f"{bucket}/harvest/harvest-0000000000000000")


def test_it_opens_with_xarray_alone(tmp_path, local, bucket, monkeypatch):
    harvest_toy(Store(tmp_path / "elsewhere"), LENGTHS, destination=bucket)
    from obstore.store import from_url
    from zarr.storage import ObjectStore

    plain = ObjectStore(from_url(f"{url_of(local, bucket)}/activations.zarr", client_options={"allow_http": True}))
    dataset = xr.open_zarr(plain, consolidated=False)
    np.testing.assert_array_equal(dataset["token_id"].values, local.token_id)


def test_interrupted_and_through_a_bad_network_it_ends_with_the_same_digest(
    tmp_path, local, faulty_bucket, monkeypatch
):
    url, faults = faulty_bucket
    faults.share_500, faults.delay_s = 0.05, 0.005
    store, budget = Store(tmp_path / "elsewhere"), [9]
    from mi_pipe.activations.harvest.forward import ForwardPass

    original = ForwardPass.start

    def start_within_budget(self, batch):
        budget[0] -= 1
        if budget[0] == 0:
            raise KeyboardInterrupt
        return original(self, batch)

    monkeypatch.setattr(ForwardPass, "start", start_within_budget)
    with pytest.raises(KeyboardInterrupt):
        harvest_toy(store, LENGTHS, destination=url)
    remote = harvest_toy(store, LENGTHS, destination=url)
    assert remote.manifest.n_launches == 2
    assert remote.digest == local.digest
    assert faults.n_500 > 0


def test_damage_in_the_object_store_is_found(tmp_path, local, bucket):
    remote = harvest_toy(Store(tmp_path / "elsewhere"), LENGTHS, destination=bucket)
    place = open_place(url_of(local, bucket))
    key = f"activations.zarr/{RESIDUAL}/c/2/0"
    data = bytearray(place.read(key))
    data[99] ^= 4
    place.write(key, bytes(data))
    assert remote.damaged_files() == [key]
    with pytest.raises(ArtifactDamagedError, match=r"c/2/0 differs from its checksum"):
        remote.read_rows(RESIDUAL, 0, remote.n_rows)
    place.remove(key)
    assert remote.damaged_files() == [key]
