"""Files exchanged for other whole ones, missing chunks and altered metadata are refused however they are read."""

import numpy as np
import pytest

from mi_pipe.activations.group import GROUP_NAME
from mi_pipe.core import checksum
from mi_pipe.core.errors import ArtifactDamagedError
from tests.activations.harvests import HEADS, RESIDUAL, harvest_toy


def exchange(a, b):
    a_bytes, b_bytes = a.read_bytes(), b.read_bytes()
    for path, data in ((a, b_bytes), (b, a_bytes)):
        path.chmod(0o644)
        path.write_bytes(data)


@pytest.mark.parametrize("name", [RESIDUAL, "token_id", "prompt_idx", "pos"])
def test_exchanged_files_of_an_array_are_refused_however_they_are_read(store, name):
    acts = harvest_toy(store, [20] * 30)
    suffix = "/0" if name == RESIDUAL else ""
    exchange(*(acts.group_path / f"{name}/c/{shard}{suffix}" for shard in (1, 3)))
    checksum.forget()
    found = type(acts)(acts.path)
    readers = [lambda: found.to_xarray()[name].values, lambda: found.group[name][:]]
    if name == RESIDUAL:
        readers += [lambda: found.read_rows(RESIDUAL, 64, 66), lambda: found.take(RESIDUAL, np.array([200]))]
        assert np.isfinite(found.read_rows(RESIDUAL, 0, 64)).all(), "shards that stayed are read"
    else:
        readers.append(lambda: getattr(found, name))
    for read in readers:
        with pytest.raises(ArtifactDamagedError):
            read()
    found.read_rows(HEADS, 0, found.n_rows)


@pytest.mark.parametrize("name", [RESIDUAL, "token_id", "prompt_offset"])
@pytest.mark.parametrize("damage", ["removed", "emptied"])
def test_a_missing_chunk_is_never_read_as_fill_values(store, name, damage):
    acts = harvest_toy(store, [20] * 30)
    victim = acts.group_path / (f"{name}/c/0/0" if name == RESIDUAL else f"{name}/c/0")
    victim.unlink()
    if damage == "emptied":
        victim.write_bytes(b"")
    found = type(acts)(acts.path, acts.manifest)
    with pytest.raises(ArtifactDamagedError, match=victim.parent.name):
        found.group[name][:]


def test_altered_metadata_is_refused(store):
    acts = harvest_toy(store, [20] * 30)
    for name in (f"{GROUP_NAME}/zarr.json", f"{GROUP_NAME}/{RESIDUAL}/zarr.json"):
        path = acts.path / name
        path.chmod(0o644)
        original = path.read_bytes()
        path.write_bytes(original.replace(b"64", b"32", 1))
        assert path.stat().st_size == len(original)
        with pytest.raises(ArtifactDamagedError, match=r"zarr\.json"):
            type(acts)(acts.path).read_rows(RESIDUAL, 0, 1)
        path.write_bytes(original)
    assert type(acts)(acts.path).read_rows(RESIDUAL, 0, 1).shape == (1, 32)
