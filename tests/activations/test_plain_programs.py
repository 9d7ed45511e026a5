"""A store opens in zarr, xarray, dask, pandas and pyarrow where mi_pipe cannot be imported at all."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mi_pipe.core.store import Store
from tests.activations.harvests import HEADS, RESIDUAL, harvest_toy

LENGTHS = [20] * 12 + [33, 7, 7, 20, 64, 1, 40]


@pytest.mark.parametrize("store_dtype", ["float16", "bfloat16", "float32"])
def test_programs_that_know_nothing_of_mi_pipe_read_every_value(store_dtype, tmp_path):
    acts = harvest_toy(Store(tmp_path / "store"), LENGTHS, precision="float32", store_dtype=store_dtype)
    token = str(acts.table().query("pos > 2")["text"].iloc[0])
    for hook in (RESIDUAL, HEADS):
        values = acts.read_rows(hook, 0, acts.n_rows)
        np.savez(tmp_path / "expected.npz", values=values, pos=acts.pos, token_id=acts.token_id)
        script = Path(__file__).parent / "read_without_mi_pipe.py"
        words = [sys.executable, "-I", "-W", "ignore", script, acts.path, hook, tmp_path / "expected.npz", token]
        done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=tmp_path, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
