"""Run by a Python that cannot import mi_pipe: read a store with zarr, xarray, dask, pandas, pyarrow and safetensors.

read_without_mi_pipe.py STORE HOOK EXPECTED.npz PARQUET_CONDITION_TOKEN
"""

import json
import sys
from pathlib import Path

sys.modules["mi_pipe"] = None

import dask.array as da  # noqa: E402
import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
import pyarrow.dataset as ds  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402
import xarray as xr  # noqa: E402
import zarr  # noqa: E402
from safetensors.numpy import load_file  # noqa: E402

folder, hook, expected_path, token = Path(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4]
expected = np.load(expected_path)
values, pos, token_id = expected["values"], expected["pos"], expected["token_id"]


def numbers(stored, is_bits):
    """Return float32; bfloat16 is the upper half of its bits."""
    return (stored.astype(np.uint32) << 16).view(np.float32) if is_bits else np.asarray(stored, np.float32)


group = zarr.open_group(folder / "activations.zarr", mode="r")
assert group.attrs["schema"].startswith("mi_pipe.activations/")
array = group[hook]
is_bits = array.attrs.get("logical_dtype") == "bfloat16"
np.testing.assert_array_equal(numbers(array[:], is_bits), values)
np.testing.assert_array_equal(numbers(array.oindex[[3, 100, 101], :], is_bits), values[[3, 100, 101]])
np.testing.assert_array_equal(group["pos"][:], pos)
start, stop = group["prompt_offset"][5:7]
np.testing.assert_array_equal(numbers(array[start:stop], is_bits), values[start:stop])

dataset = xr.open_zarr(folder / "activations.zarr", consolidated=False)
assert dataset[hook].dims[0] == "token"
assert set(dataset[hook].coords) == {"token_id", "prompt_idx", "pos"}
np.testing.assert_array_equal(numbers(dataset[hook].values, is_bits), values)
np.testing.assert_array_equal(dataset["token_id"], token_id)
selected = dataset[hook].isel(token=(dataset["pos"] == 3).values)
np.testing.assert_array_equal(numbers(selected.values, is_bits), values[pos == 3])

lazy = da.from_zarr(str(folder / "activations.zarr"), component=hook)
decoded = lazy.map_blocks(numbers, is_bits, dtype=np.float32)
np.testing.assert_allclose(decoded.mean(0).compute(), values.mean(0), rtol=1e-4, atol=1e-6)

tokens = pd.read_parquet(folder / "tokens.parquet")
rows = tokens.query("text == @token and pos > 2")["row"]
filtered = pd.read_parquet(folder / "tokens.parquet", filters=[("text", "==", token), ("pos", ">", 2)])
assert rows.tolist() == filtered["row"].tolist()
assert len(rows) > 0
np.testing.assert_array_equal(tokens["token_id"], token_id)
table = pq.read_table(folder / "tokens.parquet", columns=["row", "text"])
assert table.num_rows == len(values)
scanned = ds.dataset(folder / "tokens.parquet").to_table(filter=ds.field("pos") == 3)
assert scanned["row"].to_pylist() == np.flatnonzero(pos == 3).tolist()
prompts = pd.read_parquet(folder / "prompts.parquet")
assert prompts["n_tokens"].sum() == len(values)

statistics = load_file(folder / "statistics.safetensors")
kept = values[~tokens[f"massive:{hook}"].to_numpy()].astype(np.float64)
np.testing.assert_allclose(statistics[f"{hook}.mean"], kept.mean(0), rtol=1e-6, atol=1e-9)
manifest = json.loads((folder / "manifest.json").read_text())
assert manifest["digest"]
assert not any(name == "mi_pipe" or name.startswith("mi_pipe.") for name, module in sys.modules.items() if module)
