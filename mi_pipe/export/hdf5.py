"""An activation store as one HDF5 file, streamed chunk by chunk in constant memory.

    /activations/<hook point>   (token, width) float16, float32, or uint16 with attribute logical_dtype: bfloat16
    /tokens, /prompts           `tokens.parquet` and `prompts.parquet`, a dataset a column (see hdf5_table.py)
    /prompt_offset              (prompt_edge) int64: prompt p has rows prompt_offset[p] to prompt_offset[p + 1]
    /statistics/<hook point>    mean, variance, norms: the stored statistics, massive rows left out

Attributes of the file: schema (`mi_pipe.hdf5/1`), id and digest of the artifact, stage, config and inputs (JSON),
model, prompts, hooks, store_dtype, shard_rows, massive_factor, precision (JSON). All are chunked with Fletcher-32
checksums, which HDF5 compares when it reads. The same store gives the same bytes.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
import pyarrow.parquet as pq

from mi_pipe.activations.row_table import TOKENS_FILE
from mi_pipe.activations.storage_dtype import fill_value, numpy_dtype
from mi_pipe.activations.store import PROMPTS_FILE
from mi_pipe.core.progress import Progress
from mi_pipe.export.hdf5_file import new_hdf5
from mi_pipe.export.hdf5_table import dataset, labelled, write_table
from mi_pipe.export.target import new_target

if TYPE_CHECKING:
    from mi_pipe.activations.store import ActivationStore

SCHEMA = "mi_pipe.hdf5/1"
ACTIVATIONS, TOKENS, PROMPTS, PROMPT_OFFSET, STATISTICS = (
    "activations",
    "tokens",
    "prompts",
    "prompt_offset",
    "statistics",
)
COVARIANCE = "covariance"
_TABLE_BYTES_A_ROW = 64


def export_hdf5(
    store: "ActivationStore", path: Path, hooks: Sequence[str] | None = None, progress: Progress | None = None
) -> Path:
    """Write a store, or some of its hook points, to a new HDF5 file; return its path.

    Raises HookPointError for an unknown hook point, ConfigError if `path` exists, DiskSpaceError if it does not fit,
    ArtifactDamagedError if a chunk differs from its checksum.
    """
    chosen = list(store.hooks if hooks is None else hooks)
    size = sum(store.array(hook).layout.row_bytes for hook in chosen) + _TABLE_BYTES_A_ROW
    reported = progress or Progress()
    with new_target(path, store.n_rows * size) as temp, new_hdf5(temp) as (file, check_disk):
        file.attrs.update(_attributes(store, chosen))
        for name, parquet in ((TOKENS, TOKENS_FILE), (PROMPTS, PROMPTS_FILE)):
            with pq.ParquetFile(store.file(parquet)) as table:
                write_table(file, name, table)
        dataset(file, PROMPT_OFFSET, store.prompt_offset)
        _write_statistics(file, store, chosen)
        for stop in _write_activations(file, store, chosen):
            check_disk()
            reported.update(stop, store.n_rows, "rows")
    return path


def _attributes(store: "ActivationStore", hooks: list[str]) -> dict[str, Any]:
    attributes: dict[str, Any] = dict(store.group.attrs)
    inputs = {role: ref.model_dump() for role, ref in store.inputs.items()}
    return {
        "schema": SCHEMA,
        "id": store.id,
        "digest": store.digest,
        "stage": store.manifest.stage,
        "config": json.dumps(store.config, sort_keys=True),
        "inputs": json.dumps(inputs, sort_keys=True),
        "model": str(attributes.get("model", "")),
        "prompts": str(attributes.get("prompts", "")),
        "hooks": labelled(hooks),
        "store_dtype": store.dtype,
        "n_tokens": store.n_rows,
        "n_prompts": store.n_prompts,
        "shard_rows": store.shard_rows,
        "massive_factor": float(attributes.get("massive_factor") or store.config["massive_factor"]),
        "precision": json.dumps(store.precision, sort_keys=True),
    }


def _write_statistics(file: h5py.File, store: "ActivationStore", hooks: list[str]) -> None:
    for hook in hooks:
        group = file.create_group(f"{STATISTICS}/{hook}")
        for name, value in store.statistics(hook).to_tensors(hook).items():
            figure = name.removeprefix(f"{hook}.")
            if value.ndim:
                dataset(group, figure, value.numpy())
            else:
                group.create_dataset(figure, data=value.item())


def _write_activations(file: h5py.File, store: "ActivationStore", hooks: list[str]) -> Iterator[int]:
    """Copy shard by shard; yield the number of rows that are in the file."""
    group = file.create_group(ACTIVATIONS)
    targets = {hook: _create(group, store, hook) for hook in hooks}
    for start in range(0, store.n_rows, store.shard_rows):
        stop = min(store.n_rows, start + store.shard_rows)
        for hook, target in targets.items():
            array = store.array(hook)
            for first in range(start, stop, array.layout.chunk_rows):
                last = min(stop, first + array.layout.chunk_rows)
                target[first:last] = array.read(first, last)
        yield stop


def _create(group: h5py.Group, store: "ActivationStore", hook: str) -> h5py.Dataset:
    layout = store.array(hook).layout
    created = group.create_dataset(
        hook,
        (store.n_rows, layout.width),
        numpy_dtype(layout.store_dtype),
        chunks=(min(layout.chunk_rows, store.n_rows), layout.width),
        fletcher32=True,
        fillvalue=np.array(fill_value(layout.store_dtype), numpy_dtype(layout.store_dtype)),
    )
    created.attrs["token_shape"] = np.array(layout.token_shape, np.int64)
    for axis, name in enumerate(("token", layout.dimension)):
        created.dims[axis].label = name
    if layout.store_dtype == "bfloat16":
        created.attrs["logical_dtype"] = "bfloat16"
    return created
