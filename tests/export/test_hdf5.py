"""An activation store as HDF5 and back: h5py reads it without mi_pipe, and every bit comes back."""

import gc
import hashlib
import json
import resource
import shutil

import h5py
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch

import mi_pipe
from mi_pipe.activations.harvest.capture import capture
from mi_pipe.core.errors import ArtifactDamagedError, ConfigError, DiskSpaceError, HookPointError
from mi_pipe.core.stage import execute
from mi_pipe.core.store import Store
from mi_pipe.export.hdf5 import export_hdf5
from mi_pipe.export.hdf5_table import read_table, write_table
from mi_pipe.export.saelens import export_saelens
from stages import import_activations
from stages.import_activations import ImportConfig, Inputs
from tests.activations.harvests import HEADS, RESIDUAL, harvest_toy, tree_hashes

LENGTHS = [20] * 12 + [33, 7, 7, 20, 64, 1, 40]


@pytest.fixture(scope="module", params=["float16", "float32", "bfloat16"])
def acts(request, tmp_path_factory):
    store = Store(tmp_path_factory.mktemp("hdf5"))
    return harvest_toy(store, LENGTHS, precision="float32", store_dtype=request.param, massive_factor=1.2)


def import_file(path, store, **fields):
    result = execute(import_activations.STAGE, ImportConfig(files=(path,), **fields), Inputs(), store)
    return mi_pipe.open(result.artifact.path)


def test_h5py_reads_values_tables_and_provenance(acts, tmp_path):
    path = export_hdf5(acts, tmp_path / "acts.h5")
    table = pd.read_parquet(acts.path / "tokens.parquet")
    with h5py.File(path) as file:
        assert file.attrs["schema"] == "mi_pipe.hdf5/1"
        assert (file.attrs["id"], file.attrs["digest"]) == (acts.id, acts.digest)
        assert json.loads(file.attrs["config"]) == acts.config
        assert list(file.attrs["hooks"]) == [RESIDUAL, HEADS]
        for hook in acts.hooks:
            stored = file["activations"][hook]
            assert stored.fletcher32
            assert stored.chunks is not None
            assert [stored.dims[axis].label for axis in (0, 1)] == list(acts.group[hook].metadata.dimension_names)
            values = stored[:]
            if acts.dtype == "bfloat16":
                assert stored.attrs["logical_dtype"] == "bfloat16"
                values = (values.astype(np.uint32) << 16).view(np.float32)
            np.testing.assert_array_equal(values, acts.read_rows(hook, 0, acts.n_rows))
            np.testing.assert_array_equal(file["statistics"][hook]["mean"], acts.statistics(hook).mean)
        for name in ("row", "prompt_idx", "pos", "token_id", f"massive:{HEADS}"):
            np.testing.assert_array_equal(file["tokens"][name], table[name])
            assert file["tokens"][name].fletcher32
        text = file["tokens/text:values"].asstr()[:][file["tokens/text"][:]]
        assert text.tolist() == table["text"].astype(str).tolist()
        np.testing.assert_array_equal(file["prompts/n_tokens"], LENGTHS)
        np.testing.assert_array_equal(np.diff(file["prompt_offset"]), LENGTHS)


def test_it_comes_back_bit_for_bit(acts, tmp_path):
    path = export_hdf5(acts, tmp_path / "acts.h5")
    again = import_file(path, Store(tmp_path / "store"))
    assert again.manifest.stage == "import_activations"
    again.check()
    before, after = tree_hashes(acts), tree_hashes(again)
    same = [name for name in before if not name.startswith("commits/") and name != "activations.zarr/zarr.json"]
    assert {name: after[name] for name in same} == {name: before[name] for name in same}
    assert set(after) == set(before)
    for shard in range(acts.summary["n_shards"]):
        records = [json.loads((store.path / f"commits/{shard:06d}.json").read_text()) for store in (acts, again)]
        assert records[0]["files"] == records[1]["files"]
    assert again.precision == acts.precision
    assert str(path) not in json.dumps(again.config)
    second = export_hdf5(again, tmp_path / "again.h5")
    third = import_file(second, Store(tmp_path / "third"))
    assert {n: v for n, v in tree_hashes(third).items() if "/c/" in n} == {n: v for n, v in after.items() if "/c/" in n}


def test_a_capture_of_items_that_are_no_tokens_comes_back_too(tmp_path):
    module = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.ReLU(), torch.nn.Linear(7, 3))
    acts = capture(module, torch.randn(100, 5), ["0", "1.input"], Store(tmp_path / "store"))
    assert acts.by_token("0").index.tolist() == [-1]
    again = import_file(export_hdf5(acts, tmp_path / "acts.h5"), Store(tmp_path / "other"))
    before, after = tree_hashes(acts), tree_hashes(again)
    same = [name for name in before if not name.startswith("commits/") and name != "activations.zarr/zarr.json"]
    assert {name: after[name] for name in same} == {name: before[name] for name in same}


def test_equal_stores_give_equal_files(acts, tmp_path):
    files = [export_hdf5(acts, tmp_path / name) for name in ("a.h5", "b.h5")]
    assert len({hashlib.sha256(file.read_bytes()).hexdigest() for file in files}) == 1


def test_some_hook_points_alone_go_out_and_come_in(acts, tmp_path):
    path = export_hdf5(acts, tmp_path / "heads.h5", [HEADS])
    with h5py.File(path) as file:
        assert list(file["activations"]) == [HEADS]
    again = import_file(path, Store(tmp_path / "store"))
    assert again.hooks == [HEADS]
    assert again.array(HEADS).layout.token_shape == (4, 8)
    both = export_hdf5(acts, tmp_path / "both.h5")
    assert import_file(both, Store(tmp_path / "store"), hooks={HEADS: ""}).hooks == [HEADS]
    with pytest.raises(ConfigError, match=r"Did you mean 'blocks\.1\.attn\.hook_z'"):
        import_file(both, Store(tmp_path / "store"), hooks={"blocks.1.attn.hook_q": ""})


def test_nothing_is_replaced_and_nothing_half_written_is_left(acts, tmp_path, monkeypatch):
    (tmp_path / "here.h5").write_bytes(b"precious")
    with pytest.raises(ConfigError, match="exists already"):
        export_hdf5(acts, tmp_path / "here.h5")
    assert (tmp_path / "here.h5").read_bytes() == b"precious"
    with pytest.raises(ConfigError, match="no folder"):
        export_hdf5(acts, tmp_path / "nowhere" / "acts.h5")
    with pytest.raises(HookPointError):
        export_hdf5(acts, tmp_path / "acts.h5", ["blocks.0.hook_resid_pots"])
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 1000))
    with pytest.raises(DiskSpaceError, match=r"acts\.h5 takes"):
        export_hdf5(acts, tmp_path / "acts.h5")
    assert [path.name for path in tmp_path.iterdir()] == ["here.h5"]


@pytest.mark.parametrize("export", [export_hdf5, export_saelens])
@pytest.mark.parametrize("limit", [3_000, 60_000, 150_000])
def test_a_disk_that_fills_up_is_one_sentence_and_leaves_nothing(export, limit, tmp_path):
    """A limit on the size of files stands for the disk: the kernel refuses the write that goes beyond it."""
    acts = harvest_toy(Store(tmp_path / "store"), [40] * 32, store_dtype="float32")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(DiskSpaceError, match="Free space"):
            export(acts, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    gc.collect()
    assert [path.name for path in tmp_path.iterdir()] == ["store"]
    export(acts, tmp_path / "out")


def test_a_damaged_shard_stops_the_export(tmp_path):
    acts = harvest_toy(Store(tmp_path / "store"), [40] * 8)
    shard = acts.path / "activations.zarr" / RESIDUAL / "c/2/0"
    shard.chmod(0o644)
    data = bytearray(shard.read_bytes())
    data[100] ^= 4
    shard.write_bytes(data)
    with pytest.raises(ArtifactDamagedError, match="c/2/0"):
        export_hdf5(acts, tmp_path / "acts.h5")
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_a_changed_bit_in_the_file_is_found_on_import(tmp_path):
    acts = harvest_toy(Store(tmp_path / "store"), [40] * 8)
    path = export_hdf5(acts, tmp_path / "acts.h5")
    data = bytearray(path.read_bytes())
    values = acts.array(RESIDUAL).read(0, 4).tobytes()
    data[data.index(values) + 5] ^= 16
    path.write_bytes(data)
    with pytest.raises(ArtifactDamagedError, match=RESIDUAL):
        import_file(path, Store(tmp_path / "other"))
    assert Store(tmp_path / "other").published_ids() == []


def test_any_table_comes_back_byte_for_byte(tmp_path):
    frame = pd.DataFrame(
        {
            "number": np.arange(10, dtype=np.int32),
            "nullable": pd.array([1, None] * 5, "Int32"),
            "text": pd.Categorical(["\x00", "é", "a\x00\x00", "", " x"] * 2),
            "plain": ["p", "q"] * 5,
            "missing": ["p", None] * 5,
            "none": pd.array([None] * 10, "string"),
            "flag": [True, False] * 5,
            "real": np.linspace(0, 1, 10),
        }
    )
    frame.to_parquet(tmp_path / "a.parquet", index=False, row_group_size=3)
    with h5py.File(tmp_path / "a.h5", "w") as file, pq.ParquetFile(tmp_path / "a.parquet") as table:
        write_table(file, "table", table)
    with h5py.File(tmp_path / "a.h5") as file:
        found = read_table(file["table"])
    found.to_pandas().to_parquet(tmp_path / "b.parquet", index=False, row_group_size=3)
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()
