"""SAELens' cached activations: HuggingFace datasets reads them anywhere, SAELens itself where it is installed.

The proof with SAELens needs an environment of its own (it wants transformer-lens below 4):

    python -m venv peers && peers/bin/pip install torch==2.13.0 sae-lens
    MI_PIPE_SAELENS_PYTHON=peers/bin/python pytest tests/export/test_saelens.py
"""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from datasets import load_from_disk

from mi_pipe.core.errors import ArtifactDamagedError, ConfigError, HookPointError
from mi_pipe.core.store import Store
from mi_pipe.export import saelens
from mi_pipe.export.saelens import export_saelens
from tests.activations.harvests import HEADS, RESIDUAL, harvest_toy

SAELENS = "MI_PIPE_SAELENS_PYTHON"
N_PROMPTS, N_POS = 30, 20


@pytest.fixture(scope="module", params=["float16", "float32", "bfloat16"])
def acts(request, tmp_path_factory):
    store = Store(tmp_path_factory.mktemp("saelens"))
    return harvest_toy(store, [N_POS] * N_PROMPTS, precision="float32", store_dtype=request.param)


def test_datasets_reads_every_value_and_token(acts, tmp_path, monkeypatch):
    monkeypatch.setattr(saelens, "_BATCH_BYTES", 20_000)
    monkeypatch.setattr(saelens, "_FILE_BYTES", 60_000)
    folder = export_saelens(acts, tmp_path / "cache")
    assert len(list(folder.glob("*.arrow"))) > 1
    found = load_from_disk(str(folder))
    assert found.column_names == [RESIDUAL, HEADS, "token_ids"]
    assert len(found) == N_PROMPTS
    assert found.features[RESIDUAL].shape == (N_POS, 32)
    expected_dtype = "float32" if acts.dtype == "bfloat16" else acts.dtype
    assert found.features[HEADS].dtype == expected_dtype
    arrays = found.with_format("numpy")
    for hook in acts.hooks:
        whole = acts.read_rows(hook, 0, acts.n_rows).reshape(N_PROMPTS, N_POS, 32)
        np.testing.assert_array_equal(np.asarray(arrays[hook][:]), whole)
    np.testing.assert_array_equal(np.asarray(arrays["token_ids"][:]).reshape(-1), acts.token_id)
    assert acts.digest in found.info.description


def test_the_folder_is_what_saelens_own_runner_writes(acts, tmp_path):
    """Columns and files as CacheActivationsRunner._create_shard and _consolidate_shards make them."""
    folder = export_saelens(acts, tmp_path / "cache", [RESIDUAL])
    names = {path.name for path in folder.iterdir()}
    assert names == {"data-00000-of-00001.arrow", "dataset_info.json", "state.json"}
    state = json.loads((folder / "state.json").read_text())
    assert set(state) == {
        "_data_files",
        "_fingerprint",
        "_format_columns",
        "_format_kwargs",
        "_format_type",
        "_output_all_columns",
        "_split",
    }
    with pa.ipc.open_stream(folder / "data-00000-of-00001.arrow") as stream:
        assert stream.schema.field("token_ids").type == pa.list_(pa.int32(), N_POS)


def test_prompts_of_several_lengths_are_refused_before_anything_is_written(tmp_path):
    acts = harvest_toy(Store(tmp_path / "store"), [20, 20, 7])
    with pytest.raises(ConfigError, match=r"prompts of one length.*7 to 20 rows"):
        export_saelens(acts, tmp_path / "cache")
    with pytest.raises(HookPointError):
        export_saelens(harvest_toy(Store(tmp_path / "store"), [20, 20]), tmp_path / "cache", ["blocks.9"])
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_a_damaged_shard_leaves_no_folder(tmp_path):
    acts = harvest_toy(Store(tmp_path / "store"), [20] * 8)
    (acts.path / "activations.zarr" / HEADS / "c/1/0").unlink()
    with pytest.raises(ArtifactDamagedError, match="c/1/0"):
        export_saelens(acts, tmp_path / "cache")
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


@pytest.mark.peers
@pytest.mark.skipif(SAELENS not in os.environ, reason=f"{SAELENS} names no Python with sae-lens")
def test_saelens_trains_on_exactly_these_rows(acts, tmp_path):
    folder = export_saelens(acts, tmp_path / "cache")
    script = Path(__file__).parent / "read_with_saelens.py"
    for hook in acts.hooks:
        out = tmp_path / f"{hook}.npz"
        words = [os.environ[SAELENS], script, folder, hook, str(N_POS), "32", out]
        done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
        whole = acts.read_rows(hook, 0, acts.n_rows)
        with np.load(out) as read:
            np.testing.assert_array_equal(read["raw"], whole)
            np.testing.assert_array_equal(read["token_ids"], acts.token_id)
            shuffled = read["batches"]
        assert shuffled.shape == (acts.n_rows, 32)
        order = np.lexsort(whole.T), np.lexsort(shuffled.T)
        np.testing.assert_array_equal(whole[order[0]], shuffled[order[1]])
