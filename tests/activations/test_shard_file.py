"""Shards are the bytes that zarr-python writes."""

import numpy as np
import pytest
import torch
import zarr

from mi_pipe.activations.group import GROUP_NAME, create_group
from mi_pipe.activations.layout import ArrayLayout, StoreLayout, chunk_rows_for, shard_rows_for
from mi_pipe.activations.shard_file import ShardBuffer
from mi_pipe.activations.storage_dtype import as_stored, decode, torch_store_dtype
from mi_pipe.core.place import LocalPlace

HOOK = "blocks.0.hook_resid_post"


def make_store(tmp_path, n_rows, store_dtype, shard_rows=16, chunk_rows=4):
    array = ArrayLayout(HOOK, (2, 3), "head_d_head", store_dtype, chunk_rows, shard_rows)
    layout = StoreLayout(n_rows, shard_rows, (array,))
    rows = {name: np.arange(n_rows, dtype=np.int32) for name in ("token_id", "prompt_idx", "pos")}
    create_group(LocalPlace(tmp_path), tmp_path / "building", layout, rows, np.array([0, n_rows]), {"hooks": [HOOK]})
    values = torch.randn(n_rows, 6, generator=torch.Generator().manual_seed(n_rows))
    return layout, as_stored(values.to(torch_store_dtype(store_dtype)))


@pytest.mark.parametrize("store_dtype", ["float16", "float32", "bfloat16"])
@pytest.mark.parametrize("n_rows", [1, 4, 15, 16, 17, 37, 48])
def test_a_shard_file_is_byte_for_byte_what_zarr_python_writes(tmp_path, n_rows, store_dtype):
    layout, values = make_store(tmp_path, n_rows, store_dtype)
    array = layout.arrays[0]
    zarr.open_group(tmp_path / GROUP_NAME, mode="r+")[HOOK].with_config({"write_empty_chunks": True})[:] = values
    buffer = ShardBuffer(array)
    for shard in range(layout.n_shards):
        start, stop = layout.bounds(shard)
        for rows in np.array_split(np.random.default_rng(shard).permutation(stop - start), 3):
            buffer.put(np.sort(rows), values[start:stop][np.sort(rows)])
        (tmp_path / "ours").write_bytes(buffer.encode(stop - start))
        expected = tmp_path / GROUP_NAME / array.key(shard)
        assert (tmp_path / "ours").read_bytes() == expected.read_bytes()
        assert expected.stat().st_size == array.file_bytes(stop - start)


def test_the_group_reads_nan_where_no_shard_is_written(tmp_path):
    make_store(tmp_path, 20, "float16")
    assert np.isnan(zarr.open_group(tmp_path / GROUP_NAME, mode="r")[HOOK][:]).all()


def test_decoding_is_exact_for_every_stored_value():
    bits = np.arange(1 << 16, dtype=np.uint16)
    expected = torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16).float().numpy()
    np.testing.assert_array_equal(decode(bits, "bfloat16"), expected)
    np.testing.assert_array_equal(decode(bits.view(np.float16), "float16"), bits.view(np.float16).astype(np.float32))


def test_chunks_and_shards_lie_at_the_measured_knees():
    for width in (64, 576, 768, 4096, 50_000):
        shard_rows = shard_rows_for(10**8, 2 * width)
        chunk_rows = chunk_rows_for(2 * width, shard_rows)
        assert shard_rows % chunk_rows == 0
        assert shard_rows * 2 * width <= 1 << 27 < 2 * shard_rows * 2 * width
        assert chunk_rows * 2 * width <= 2_500_000 < 2 * chunk_rows * 2 * width
    assert 8 <= 50_000 / shard_rows_for(50_000, 128) <= 32, "small stores have units to resume from"
