"""Stores of every version on disk stay readable, and the present version is written as its golden store was.

A change of format that does not raise the version fails here. `tests/golden/make.py` makes the store of a new version.
"""

import json
from pathlib import Path

import google_crc32c
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from safetensors import safe_open

import mi_pipe
from mi_pipe.activations.commits import commit_name
from mi_pipe.activations.group import GROUP_NAME, PROMPT_OFFSET, ROW_ARRAYS, SCHEMA, create_group
from mi_pipe.activations.harvest.writer import ShardWriter
from mi_pipe.activations.layout import StoreLayout
from mi_pipe.activations.raw_array import read_array_layout
from mi_pipe.activations.row_table import row_table, write_row_table
from mi_pipe.activations.tokens import Tokens
from mi_pipe.core.manifest import Manifest, parse_manifest
from mi_pipe.core.place import LocalPlace
from mi_pipe.verifying import verify
from tests.activations.harvests import HEADS, RESIDUAL

FOLDERS = {path.parent.name: path for path in sorted(Path(__file__).parent.glob("v*/harvest-*"))}
PRESENT = FOLDERS[f"v{SCHEMA.rpartition('/')[2]}"]

# float16 bits of values 0 to 2 of rows 0 and 100, and of the last three of row 171.
BITS = {
    RESIDUAL: {0: [0x4029, 0x48DB, 0xC1DF], 100: [0x4567, 0x3801, 0x45F9], 171: [0x3CE1, 0xC2DB, 0x3B24]},
    HEADS: {0: [0xC43D, 0xC41C, 0xC0F2], 100: [0xBA8F, 0xC093, 0xAFB9], 171: [0xC5B4, 0xBC2B, 0x3710]},
}
DIGESTS = {
    "v1": "e02ca854b8012689616df8e14cf1d102e57095ca018cb185e112ff1bcff4875d",
    "v2": "aecb4efc4f4835382f573e7e926f6ad85f2d3db4f844b521074c61e4597abdaf",
}
MEDIAN_NORMS = {RESIDUAL: 26.3167724609375, HEADS: 16.397236824035645}
OFFSETS = [0, 20, 40, 73, 80, 87, 107, 148, 149, 172]


def picked(row: int) -> slice:
    return slice(-3, None) if row == 171 else slice(3)


@pytest.mark.parametrize("version", FOLDERS)
def test_every_version_reads_as_it_was_written(version):
    acts = mi_pipe.open(FOLDERS[version])
    assert acts.digest == DIGESTS[version]
    assert (acts.n_rows, acts.n_prompts, acts.hooks, acts.dtype, acts.shard_rows) == (
        172, 9, [RESIDUAL, HEADS], "float16", 64,
    )  # fmt: skip
    for hook, rows in BITS.items():
        for row, bits in rows.items():
            expected = np.array(bits, np.uint16).view(np.float16).astype(np.float32)
            np.testing.assert_array_equal(acts.read_rows(hook, row, row + 1)[0, picked(row)], expected)
            np.testing.assert_array_equal(acts.to_xarray()[hook].values[row, picked(row)], expected)
        assert acts.statistics(hook).median_norm == MEDIAN_NORMS[hook]
        assert acts.statistics(hook).n_rows == 172
        assert not acts.massive(hook).any()
    assert acts.token_id[:8].tolist() == [0, 54, 40, 32, 17, 19, 2, 4]
    assert acts.prompt_offset.tolist() == OFFSETS
    assert acts.pos[-3:].tolist() == [20, 21, 22]
    assert acts.table()["text"].astype(str).iloc[[0, 171]].tolist() == [" 0", " 26"]
    assert acts.prompts.columns.tolist() == ["prompt_idx", "n_tokens", "source"]
    assert acts.precision["hooks"][HEADS]["n_rows"] == 171
    assert verify(str(FOLDERS[version]), deep=True).is_whole


@pytest.mark.parametrize("version", FOLDERS)
@pytest.mark.parametrize("hook", [RESIDUAL, HEADS])
def test_the_bytes_lie_where_the_specification_says(version, hook):
    width, chunk_rows, shard_rows, n_rows = 32, 16, 64, 172
    stride = chunk_rows * width * 2 + 4
    for row, bits in BITS[hook].items():
        shard, within = divmod(row, shard_rows)
        chunk, line = divmod(within, chunk_rows)
        data = (FOLDERS[version] / GROUP_NAME / hook / f"c/{shard}/0").read_bytes()
        stored = data[chunk * stride : (chunk + 1) * stride]
        assert google_crc32c.value(stored[:-4]) == int.from_bytes(stored[-4:], "little")
        found = np.frombuffer(stored[:-4], "<u2").reshape(chunk_rows, width)[line]
        assert found[picked(row)].tolist() == bits
        n_chunks = -(-min(shard_rows, n_rows - shard * shard_rows) // chunk_rows)
        index = data[n_chunks * stride :]
        assert len(index) == 16 * shard_rows // chunk_rows + 4
        assert google_crc32c.value(index[:-4]) == int.from_bytes(index[-4:], "little")
        entries = np.frombuffer(index[:-4], "<u8").reshape(-1, 2)
        assert entries[:n_chunks].tolist() == [[i * stride, stride] for i in range(n_chunks)]
        assert (entries[n_chunks:] == 2**64 - 1).all()


def golden_layout() -> StoreLayout:
    group = LocalPlace(PRESENT / GROUP_NAME)
    arrays = tuple(read_array_layout(group, hook)[0] for hook in (RESIDUAL, HEADS))
    return StoreLayout(172, 64, arrays)


def test_the_present_version_is_written_as_its_golden_store(tmp_path):
    acts, layout, place = mi_pipe.open(PRESENT), golden_layout(), LocalPlace(tmp_path / "made")
    attributes = json.loads((PRESENT / GROUP_NAME / "zarr.json").read_text())["attributes"]
    assert attributes.pop("schema") == SCHEMA
    rows = {name: getattr(acts, name) for name in ROW_ARRAYS}
    create_group(place, tmp_path / "building", layout, rows, np.array(OFFSETS), attributes)
    with ShardWriter(
        place, LocalPlace(tmp_path / "scratch"), layout, attributes["plan_hash"], lambda _: None
    ) as writer:
        for shard in range(layout.n_shards):
            buffers = writer.buffers()
            start, stop = layout.bounds(shard)
            for hook, buffer in buffers.items():
                buffer.put(np.arange(stop - start), acts.array(hook).read(start, stop))
            writer.submit(shard, buffers)
    made = sorted(place.keys())
    assert made == sorted([*LocalPlace(PRESENT).keys(GROUP_NAME), *LocalPlace(PRESENT).keys("commits")])
    for key in made:
        found, expected = place.read(key), (PRESENT / key).read_bytes()
        if key.endswith("zarr.json"):  # its layout on the page is zarr-python's
            found, expected = json.loads(found), json.loads(expected)
        assert found == expected, key
    assert commit_name(2) in made
    assert f"{GROUP_NAME}/{PROMPT_OFFSET}/c/0" in made


def test_the_tables_are_written_as_in_the_golden_store(tmp_path):
    acts = mi_pipe.open(PRESENT)
    golden = pq.read_table(PRESENT / "tokens.parquet")
    tokens = Tokens(acts.token_id, acts.prompt_offset, np.ones(172, bool))
    texts = pd.Series(golden["text"].to_pandas())
    flags = {hook: acts.massive(hook) for hook in acts.hooks}
    write_row_table(tmp_path / "tokens.parquet", row_table(tokens, texts, flags))
    assert pq.read_table(tmp_path / "tokens.parquet").equals(golden)
    with safe_open(PRESENT / "statistics.safetensors", "np") as file:
        found = acts.statistics(RESIDUAL).to_tensors(RESIDUAL)
        assert {key: (list(value.shape), value.numpy().dtype) for key, value in found.items()} == {
            key: (list(file.get_tensor(key).shape), file.get_tensor(key).dtype)
            for key in file.keys()  # noqa: SIM118 (a file, not a dictionary)
            if key.startswith(RESIDUAL)
        }


def test_manifests_have_the_fields_of_the_golden_ones():
    data = (PRESENT / "manifest.json").read_bytes()
    assert set(json.loads(data)) == {*Manifest.model_fields, "checksum"}
    assert parse_manifest(data, "golden").to_json() == data
    first = json.loads((FOLDERS["v1"] / "manifest.json").read_text())
    assert set(first) == set(Manifest.model_fields) - {"sources"}
