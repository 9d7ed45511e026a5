"""Arrays of other writers read as our own do, and what is missing of them is never read as fill values."""

import numpy as np
import pytest
import zarr

from mi_pipe.activations.raw_array import RawArray
from mi_pipe.activations.training.shuffled import ShuffledReader
from mi_pipe.activations.zarr_array import ZarrArray, open_row_array
from mi_pipe.core.errors import ArtifactDamagedError, ConfigError
from mi_pipe.core.place import LocalPlace
from mi_pipe.core.store import Store
from tests.activations.foreign import WAYS, rewrite
from tests.activations.harvests import HEADS, RESIDUAL, harvest_toy

LENGTHS = [30] * 9 + [17] * 3


@pytest.mark.parametrize("way", WAYS)
def test_other_codecs_chunks_and_versions_read_as_our_own(tmp_path, way):
    ours = harvest_toy(Store(tmp_path), LENGTHS)
    expected = {hook: ours.read_rows(hook, 0, ours.n_rows) for hook in (RESIDUAL, HEADS)}
    rows = np.random.default_rng(0).integers(0, ours.n_rows, 70)
    batches = [batch[RESIDUAL].clone() for batch in ShuffledReader(ours, [RESIDUAL], 40, pool_rows=10**6).batches(0, 4)]
    acts = rewrite(ours, RESIDUAL, way)
    assert isinstance(acts.array(RESIDUAL), ZarrArray)
    assert isinstance(acts.array(HEADS), RawArray)
    assert acts.width(RESIDUAL) == expected[RESIDUAL].shape[1]
    np.testing.assert_array_equal(acts.read_rows(RESIDUAL, 0, acts.n_rows), expected[RESIDUAL])
    np.testing.assert_array_equal(acts.read_rows(RESIDUAL, 37, 141), expected[RESIDUAL][37:141])
    np.testing.assert_array_equal(acts.take(RESIDUAL, rows), expected[RESIDUAL][rows])
    for found in acts.blocks(RESIDUAL, 25):
        np.testing.assert_array_equal(found.values, expected[RESIDUAL][found.rows])
    seen = [batch[RESIDUAL].clone() for batch in ShuffledReader(acts, [RESIDUAL], 40, pool_rows=10**6).batches(0, 4)]
    assert {row.numpy().tobytes() for batch in seen for row in batch} <= {row.tobytes() for row in expected[RESIDUAL]}
    assert len(seen) == len(batches)
    for bad in ((0, acts.n_rows + 1), (-1, 3)):
        with pytest.raises(IndexError):
            acts.read_rows(RESIDUAL, *bad)


def test_bfloat16_bits_of_other_writers_are_known_by_their_attribute(tmp_path):
    ours = harvest_toy(Store(tmp_path), LENGTHS, store_dtype="bfloat16")
    expected = ours.read_rows(RESIDUAL, 0, ours.n_rows)
    acts = rewrite(ours, RESIDUAL, "zstd")
    np.testing.assert_array_equal(acts.read_rows(RESIDUAL, 0, acts.n_rows), expected)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("how", ["gone", "empty", "cut"])
def test_what_is_missing_or_cut_is_never_read_as_data(tmp_path, way, how):
    acts = rewrite(harvest_toy(Store(tmp_path), LENGTHS), RESIDUAL, way)
    whole = acts.read_rows(RESIDUAL, 0, acts.n_rows)
    array = acts.array(RESIDUAL)
    key = array._array.metadata.encode_chunk_key((1,) + (0,) * (array._array.ndim - 1))
    path = acts.group_path / RESIDUAL / key
    if how == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: 0 if how == "empty" else -3])
    first = array.layout.shard_rows
    for reader in (acts, type(acts)(acts.path, acts.manifest)):
        np.testing.assert_array_equal(reader.read_rows(RESIDUAL, 0, first), whole[:first])
        with pytest.raises(ArtifactDamagedError, match=RESIDUAL.replace(".", r"\.")):
            reader.read_rows(RESIDUAL, first, min(acts.n_rows, 2 * first))
        with pytest.raises(ArtifactDamagedError):
            list(reader.blocks(RESIDUAL))


@pytest.mark.parametrize("location", ["start", "end"])
def test_a_chunk_that_its_shard_lacks_is_missing(tmp_path, location):
    from zarr.codecs import BytesCodec, Crc32cCodec, ShardingCodec

    inner = ShardingCodec(chunk_shape=(4, 5), codecs=[BytesCodec(), Crc32cCodec()], index_location=location)
    group = zarr.create_group(tmp_path / "g.zarr")
    array = group.create_array(
        "a", shape=(22, 5), dtype="f4", chunks=(8, 5), serializer=inner, compressors=None, fill_value=0
    )
    array[:] = np.arange(110, dtype="f4").reshape(22, 5) + 1
    place = LocalPlace(tmp_path / "g.zarr")
    found = ZarrArray(place, "a")
    assert (found.layout.chunk_rows, found.layout.shard_rows) == (4, 8)
    np.testing.assert_array_equal(found.read(0, 22), array[:])
    array[12:16] = 0  # all fill value: zarr leaves the chunk out of its shard
    with pytest.raises(ArtifactDamagedError, match="lacks chunks"):
        ZarrArray(place, "a").read(9, 11)
    np.testing.assert_array_equal(ZarrArray(place, "a").read(16, 22), array[16:])


@pytest.mark.parametrize("way", ["unsharded", "columns"])
def test_altered_bytes_are_found_by_the_manifests_checksums(tmp_path, way):
    acts = rewrite(harvest_toy(Store(tmp_path), LENGTHS), RESIDUAL, way)
    path = acts.group_path / RESIDUAL / "c/1/0"
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    with pytest.raises(ArtifactDamagedError, match=r"c/1/0 differs from its checksum"):
        acts.read_rows(RESIDUAL, 0, acts.n_rows)


def test_altered_bytes_are_found_by_the_codecs_where_no_manifest_tells(tmp_path):
    acts = rewrite(harvest_toy(Store(tmp_path), LENGTHS), RESIDUAL, "columns")
    path = acts.group_path / RESIDUAL / "c/1/0"
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    with pytest.raises(ArtifactDamagedError, match="cannot be decoded"):
        ZarrArray(acts.group_place, RESIDUAL).read(0, acts.n_rows)


def test_what_is_no_activation_array_is_refused(tmp_path):
    group = zarr.create_group(tmp_path / "g.zarr")
    group.create_array("ints", shape=(4, 4), dtype="i4")
    group.create_array("vector", shape=(4,), dtype="f4")
    inner = {"chunk_shape": (2, 4), "codecs": [zarr.codecs.BytesCodec()]}
    nested = zarr.codecs.ShardingCodec(chunk_shape=(4, 4), codecs=[zarr.codecs.ShardingCodec(**inner)])
    group.create_array("nested", shape=(8, 4), dtype="f4", chunks=(8, 4), serializer=nested, compressors=None)
    place = LocalPlace(tmp_path / "g.zarr")
    for name, text in (("ints", "int32"), ("vector", "shape"), ("nested", "missing chunks")):
        with pytest.raises(ConfigError, match=text):
            open_row_array(place, name)
    with pytest.raises(ArtifactDamagedError, match="absent"):
        open_row_array(place, "absent")


def test_row_indices_that_are_missing_are_not_read_as_minus_one(tmp_path):
    acts = harvest_toy(Store(tmp_path), LENGTHS)
    (acts.group_path / "prompt_idx/c/1").unlink()
    with pytest.raises(ArtifactDamagedError, match="prompt_idx/c/1 is missing"):
        acts.prompt_split(0.5, 0)
