"""Rewrites the arrays of an activation store as other programs would have written them."""

import shutil

import numpy as np
import zarr
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec, ShardingCodec, ZstdCodec

from mi_pipe.activations.store import ActivationStore
from mi_pipe.core.canonical import file_sha256
from mi_pipe.core.manifest import FileEntry

WAYS = ("zstd", "unsharded", "blosc shards", "columns", "three axes", "big-endian", "index at start", "version 2", "f8")


def rewrite(acts: ActivationStore, hook: str, way: str) -> ActivationStore:
    """Write `hook` anew with other codecs and chunks; the values stay."""
    old = zarr.open_group(acts.group_path, mode="r")[hook]
    values, attributes, names = old[:], dict(old.attrs), old.metadata.dimension_names
    shutil.rmtree(acts.group_path / hook)
    n_rows, width = values.shape
    common = {"fill_value": 0, "attributes": attributes, "config": {"write_empty_chunks": True}}
    kinds = {
        "zstd": {"chunks": (50, width), "compressors": [ZstdCodec()]},
        "unsharded": {"chunks": (64, width), "compressors": None},
        "blosc shards": {"chunks": (16, width), "shards": (96, width), "compressors": [BloscCodec()]},
        "columns": {"chunks": (30, 7), "shards": (60, 14), "compressors": [Crc32cCodec()]},
        "big-endian": {
            "chunks": (16, width),
            "serializer": BytesCodec(endian="big"),
            "shards": (64, width),
            "compressors": [Crc32cCodec()],
        },
        "index at start": {
            "chunks": (64, width),
            "serializer": ShardingCodec(
                chunk_shape=(16, width), codecs=[BytesCodec(), Crc32cCodec()], index_location="start"
            ),
            "compressors": None,
        },
        "f8": {"chunks": (64, width)},
        "three axes": {"chunks": (40, 2, width // 2)},
        "version 2": {"chunks": (40, width), "zarr_format": 2},
    }
    if way == "three axes":
        values = values.reshape(n_rows, 4, width // 4)
        kinds[way]["chunks"] = (40, 2, width // 4)
    if way == "f8":
        values = values.astype(np.float64)
    if way not in ("version 2", "three axes"):
        common["dimension_names"] = names
    array = zarr.create_array(
        acts.group_path, name=hook, shape=values.shape, dtype=values.dtype, **common, **kinds[way]
    )
    array[:] = values
    files = {name: entry for name, entry in acts.manifest.files.items() if f"/{hook}/" not in name}
    for path in (acts.group_path / hook).rglob("*"):
        if path.is_file():
            entry = FileEntry(size_bytes=path.stat().st_size, checksum=f"sha256:{file_sha256(path)}")
            files[path.relative_to(acts.path).as_posix()] = entry
    return ActivationStore(acts.path, acts.manifest.model_copy(update={"files": files}))
