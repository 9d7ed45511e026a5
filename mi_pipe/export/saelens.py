"""An activation store in SAELens' cached-activations format: what its CacheActivationsRunner leaves on disk.

A HuggingFace `datasets` folder, one line a prompt: a column `<hook point>` of type Array2D (context_size, d_in) for
each hook point, and `token_ids`, int32 (context_size). SAELens (sae_lens/training/activations_store.py, 6.54) opens it
by `cached_activations_path` and looks at the column named as its `hook_name`; `context_size` and `d_in` have to be the
shape's. Arrow has no bfloat16, so these are written as float32, exactly. Record batches have some megabytes, so memory
does not depend on the number of prompts.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from jaxtyping import Shaped

from mi_pipe.activations.storage_dtype import decode, numpy_dtype
from mi_pipe.core.errors import ConfigError
from mi_pipe.core.progress import Progress
from mi_pipe.export.target import new_target

if TYPE_CHECKING:
    from datasets import Features

    from mi_pipe.activations.store import ActivationStore

TOKEN_IDS = "token_ids"  # noqa: S105 (a column's name)
_BATCH_BYTES = 16_000_000
_FILE_BYTES = 500_000_000
_TOKEN_BYTES = 4


def export_saelens(
    store: "ActivationStore", path: Path, hooks: Sequence[str] | None = None, progress: Progress | None = None
) -> Path:
    """Write a store, or some of its hook points, to a new folder for SAELens; return its path.

    Raises ConfigError if `path` exists or prompts differ in their number of rows, HookPointError for an unknown hook
    point, DiskSpaceError if it does not fit, ArtifactDamagedError if a chunk differs from its checksum.
    """
    chosen = list(store.hooks if hooks is None else hooks)
    n_pos = context_size(store)
    prompt_bytes = n_pos * sum(store.width(hook) for hook in chosen) * _dtype(store).itemsize
    files = _ranges(range(store.n_prompts), _FILE_BYTES // prompt_bytes)
    names = [f"data-{number:05d}-of-{len(files):05d}.arrow" for number in range(len(files))]
    features = _features(store, chosen, n_pos)
    reported = progress or Progress()
    with new_target(path, store.n_prompts * (prompt_bytes + n_pos * _TOKEN_BYTES)) as temp:
        temp.mkdir()
        for name, prompts in zip(names, files, strict=True):
            with pa.OSFile(str(temp / name), "wb") as sink, pa.ipc.new_stream(sink, features.arrow_schema) as writer:
                for batch in _ranges(prompts, _BATCH_BYTES // prompt_bytes):
                    writer.write_batch(_record_batch(store, chosen, n_pos, batch, features.arrow_schema))
                    reported.update(batch.stop, store.n_prompts, "prompts")
        _write_description(temp, store, chosen, names, features)
    return path


def context_size(store: "ActivationStore") -> int:
    """Return how many rows every prompt has; raises ConfigError if prompts differ, which SAELens cannot hold."""
    lengths = np.unique(np.diff(store.prompt_offset))
    if len(lengths) > 1 or lengths[0] == 0:
        raise ConfigError(
            f"SAELens' format holds prompts of one length, and those of {store.id} have {lengths[0]:,} to "
            f"{lengths[-1]:,} rows. Export to HDF5, or harvest text in windows of one length."
        )
    return int(lengths[0])


def _dtype(store: "ActivationStore") -> np.dtype:
    return np.dtype(np.float32) if store.dtype == "bfloat16" else numpy_dtype(store.dtype)


def _ranges(prompts: range, size: int) -> list[range]:
    """Cut prompts into ranges of at most `size`, at least 1."""
    size = max(1, size)
    return [range(start, min(prompts.stop, start + size)) for start in range(prompts.start, prompts.stop, size)]


def _features(store: "ActivationStore", hooks: Sequence[str], n_pos: int) -> "Features":
    """Return the columns as SAELens' runner declares them."""
    from datasets import Array2D, Features, List, Value

    columns: dict[str, Any] = {hook: Array2D((n_pos, store.width(hook)), _dtype(store).name) for hook in hooks}
    return Features({**columns, TOKEN_IDS: List(Value("int32"), length=n_pos)})


def _record_batch(
    store: "ActivationStore", hooks: Sequence[str], n_pos: int, prompts: range, schema: pa.Schema
) -> pa.RecordBatch:
    start, stop = prompts.start * n_pos, prompts.stop * n_pos
    columns: list[pa.Array] = []
    for hook in hooks:
        stored = store.array(hook).read(start, stop)
        values = decode(stored, "bfloat16") if store.dtype == "bfloat16" else stored
        columns.append(_matrices(values, n_pos, schema.field(hook).type))
    token_ids = pa.array(np.asarray(store.group["token_id"][start:stop], np.int32))  # pyright: ignore
    columns.append(pa.FixedSizeListArray.from_arrays(token_ids, n_pos))
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def _matrices(values: Shaped[np.ndarray, "row width"], n_pos: int, kind: Any) -> pa.Array:
    """Return rows as one (n_pos, width) matrix a prompt, without copying."""
    rows = pa.ListArray.from_arrays(_offsets(len(values), values.shape[1]), pa.array(values.reshape(-1)))
    prompts = pa.ListArray.from_arrays(_offsets(len(values) // n_pos, n_pos), rows)
    return pa.ExtensionArray.from_storage(kind, prompts)


def _offsets(n_lists: int, length: int) -> pa.Array:
    return pa.array(np.arange(n_lists + 1, dtype=np.int32) * np.int32(length))


def _write_description(
    folder: Path, store: "ActivationStore", hooks: Sequence[str], names: Sequence[str], features: "Features"
) -> None:
    """Write the two files that `datasets.load_from_disk` reads first."""
    from datasets import DatasetInfo

    description = f"Activations {store.id}, digest {store.digest}, exported by mi_pipe."
    DatasetInfo(description=description, features=features).write_to_directory(str(folder))
    state = {
        "_data_files": [{"filename": name} for name in names],
        "_fingerprint": hashlib.sha256(f"{store.digest} {list(hooks)}".encode()).hexdigest()[:16],
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    (folder / "state.json").write_text(json.dumps(state, indent=2), encoding="utf-8")
