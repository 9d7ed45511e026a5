"""verify names all damage with what it holds, in any artifact, here and by URL."""

import json

import pytest
import torch

from mi_pipe.core.canonical import file_sha256
from mi_pipe.core.errors import ArtifactIncompleteError, ArtifactNotFoundError
from mi_pipe.core.manifest import FileEntry, digest_of, write_manifest
from mi_pipe.core.place import open_place
from mi_pipe.core.progress import Progress
from mi_pipe.core.stage import execute
from mi_pipe.core.store import Store
from mi_pipe.verifying import verify
from tests.activations.harvests import RESIDUAL, harvest_toy
from tests.core.counting_stage import STAGE, CountingConfig, Inputs

LENGTHS = [20] * 20 + [33, 7, 7, 20, 64, 1, 40] * 2


@pytest.fixture
def acts(store):
    torch.set_num_threads(1)
    return harvest_toy(store, LENGTHS)


def rewrite(path, change):
    data = change(path.read_bytes())
    path.chmod(0o644)
    path.write_bytes(data)


def flipped(data):
    return data[:50] + bytes([data[50] ^ 4]) + data[51:]


def said(found):
    return [str(damage) for damage in found.damage]


def reseal(acts, name):
    """Let the manifest agree with a file that was changed."""
    path, manifest = acts.path / name, acts.manifest
    entry = FileEntry(size_bytes=path.stat().st_size, checksum=f"sha256:{file_sha256(path)}")
    files = {**manifest.files, name: entry}
    write_manifest(acts.path, manifest.model_copy(update={"files": files, "digest": digest_of(files)}))


def test_a_whole_artifact_is_whole(store, acts):
    ticks = []
    for name in (acts.id, acts.id[:12], acts.path):
        found = verify(str(name), store, deep=True, progress=Progress(ticks.append, every_s=0))
        assert found.is_whole
        assert (found.id, found.size_bytes) == (acts.id, acts.size_bytes)
        assert found.n_files == len(acts.manifest.files) + 1
    assert ticks[-1].done == ticks[-1].total == acts.size_bytes


def test_each_damaged_file_is_named_with_what_it_holds(store, acts):
    rewrite(acts.path / f"activations.zarr/{RESIDUAL}/c/3/0", flipped)
    rewrite(acts.path / "activations.zarr/token_id/c/11", flipped)
    rewrite(acts.path / "tokens.parquet", flipped)
    (acts.path / "commits/000002.json").unlink()
    rewrite(acts.path / "statistics.safetensors", lambda data: data[:-7])
    size = acts.manifest.files["statistics.safetensors"].size_bytes
    shallow = [
        "commits/000002.json is missing (the record of rows 128 to 192)",
        f"statistics.safetensors has {size - 7:,} bytes instead of {size:,}",
    ]
    assert said(verify(acts.id, store)) == shallow
    assert sorted(said(verify(acts.id, store, deep=True))) == sorted(
        [
            *shallow,
            f"activations.zarr/{RESIDUAL}/c/3/0 differs from its checksum (rows 192 to 256 of {RESIDUAL})",
            "activations.zarr/token_id/c/11 differs from its checksum (rows 704 to 744 of token_id)",
            "tokens.parquet differs from its checksum",
        ]
    )


def test_altered_records_and_metadata_are_found_without_reading_shards(store, acts):
    rewrite(acts.path / "commits/000004.json", lambda data: data.replace(b'"shard": 4', b'"shard": 5'))
    rewrite(acts.path / f"activations.zarr/{RESIDUAL}/zarr.json", lambda data: data.replace(b"744", b"745"))
    assert said(verify(acts.id, store)) == [
        f"activations.zarr/{RESIDUAL}/zarr.json differs from its checksum",
        "commits/000004.json differs from its checksum (the record of rows 256 to 320)",
    ]


@pytest.mark.parametrize(
    ("name", "before", "after", "message"),
    [
        ("commits/000004.json", '"shard": 4', '"shard": 5', "is of shard 5"),
        ("commits/000004.json", '"plan": "', '"plan": "0', "is of another plan"),
        ("commits/000004.json", '"crc32c-chunks:', '"crc32c-chunks:9', "names other files or checksums"),
        (f"activations.zarr/{RESIDUAL}/zarr.json", "744", "800", "has 800 rows in shards of 64, the group 744 in 64"),
        ("activations.zarr/zarr.json", "train_model-", "train_model-f", "as model where the manifest has"),
    ],
)
def test_files_that_contradict_one_another_are_found_even_if_each_is_whole(store, acts, name, before, after, message):
    rewrite(acts.path / name, lambda data: data.replace(before.encode(), after.encode(), 1))
    reseal(acts, name)
    (found,) = said(verify(acts.id, store))
    assert message in found
    assert found.startswith(name)


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data.replace(b'"n_launches": 1', b'"n_launches": 2'),
        lambda data: data.replace(b'"created_at": "2', b'"created_at": "3'),
        lambda data: data + b"\n",
        lambda data: data.replace(b"\n ", b"\n  ", 1),
        lambda data: data.replace(b'"label"', b'"lebal"'),
        lambda data: b"",
        lambda data: b"[]",
    ],
)
def test_every_byte_of_the_manifest_counts(store, acts, change):
    rewrite(acts.path / "manifest.json", change)
    (damage,) = verify(acts.id, store).damage
    assert damage.file == "manifest.json"


def test_a_manifest_of_another_artifact_or_none_is_found(store, acts):
    original = (acts.path / "manifest.json").read_bytes()
    write_manifest(acts.path, acts.manifest.model_copy(update={"id": "harvest-" + "0" * 16}))
    assert said(verify(acts.id, store)) == [f"manifest.json is that of harvest-{'0' * 16}"]
    (acts.path / "manifest.json").unlink()
    assert said(verify(acts.id, store)) == ["manifest.json is missing"]
    (acts.path / "manifest.json").write_bytes(original)
    assert verify(acts.id, store, deep=True).is_whole


def test_any_kind_of_artifact_is_verified(store):
    artifact = execute(STAGE, CountingConfig(), Inputs(), store).artifact
    assert verify(artifact.id, store, deep=True).is_whole
    rewrite(artifact.path / "numbers/3.txt", lambda data: b"8\n")
    assert verify(artifact.id, store).is_whole
    assert said(verify(artifact.id, store, deep=True)) == ["numbers/3.txt differs from its checksum"]


def test_manifests_of_version_1_are_read_as_before(store, acts):
    content = json.loads((acts.path / "manifest.json").read_text())
    del content["checksum"], content["sources"]
    (acts.path / "manifest.json").write_text(
        json.dumps({**content, "schema_name": "mi_pipe.manifest/1"}, sort_keys=True, indent=1) + "\n"
    )
    assert verify(acts.id, store, deep=True).is_whole


def test_what_is_not_published_is_said(store, bucket):
    with pytest.raises(ArtifactNotFoundError):
        verify("harvest-0000000000000000", store)
    with pytest.raises(ArtifactNotFoundError, match="Nothing is published at"):
        verify(f"{bucket}/harvest/harvest-0000000000000000", store)
    store.scratch("harvest-1111111111111111").mkdir(parents=True)
    with pytest.raises(ArtifactIncompleteError):
        verify("harvest-1111111111111111", store)


def test_by_url_every_object_is_compared(tmp_path, bucket):
    acts = harvest_toy(Store(tmp_path / "made"), LENGTHS, destination=bucket)
    url, elsewhere = f"{bucket}/harvest/{acts.id}", Store(tmp_path / "elsewhere")
    assert verify(url, elsewhere, deep=True).is_whole
    place = open_place(url)
    key = f"activations.zarr/{RESIDUAL}/c/3/0"
    place.write(key, flipped(place.read(key)))
    place.remove("precision.json")
    assert said(verify(url, elsewhere)) == ["precision.json is missing"]
    assert said(verify(url, elsewhere, deep=True)) == [
        f"{key} differs from its checksum (rows 192 to 256 of {RESIDUAL})",
        "precision.json is missing",
    ]
