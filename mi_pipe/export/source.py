"""What an import reads: which array of which files is which hook point, and which token each row is.

A hook point's array may go on from file to file, in the order in which the files are given. A `.npy` file has one
array: with one hook point all of them are its parts, with several each file is one hook point. In safetensors and HDF5
files the array is the one that is named, the one called as the hook point, or the only one there is.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from mi_pipe.activations.group import PROMPT_OFFSET, ROW_ARRAYS
from mi_pipe.activations.storage_dtype import StoreDType
from mi_pipe.core.errors import ConfigError, near_names
from mi_pipe.export.dumps import Concatenated, DumpArray, as_rows, kind_of, open_dump
from mi_pipe.export.origin import Origin, read_origin
from mi_pipe.export.row_labels import RowLabels, read_labels

_STORABLE: dict[torch.dtype, StoreDType] = {
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.float32: "float32",
}
_HOOK_NAME = re.compile(r"\w[\w.:-]*")
_TAKEN = (*ROW_ARRAYS, PROMPT_OFFSET, "zarr.json")


@dataclass(frozen=True)
class Source:
    """Everything that is imported."""

    arrays: dict[str, DumpArray]
    """Hook point to its rows; all have as many rows as `labels`."""
    labels: RowLabels
    store_dtype: StoreDType
    origin: Origin | None


def open_source(
    files: Sequence[Path], hooks: Mapping[str, str], tokens: Path | None, store_dtype: StoreDType | None
) -> Source:
    """Open the files and check that they belong together, before anything is written.

    `hooks` maps hook points to names of arrays ("" to find the array as the module says); none means all of a file that
    mi_pipe exported. Raises ConfigError in one sentence for whatever does not fit.
    """
    origin = _origin(files)
    picked = dict(hooks)
    if origin is not None:
        unknown = [hook for hook in hooks if hook not in origin.hooks]
        if unknown:
            raise ConfigError(f"{files[0]} holds no {unknown[0]!r}.{near_names(unknown[0], origin.hooks)}")
        picked = {hook: origin.hooks[hook] for hook in (hooks or origin.hooks)}
    _check_names(picked, files)
    labels = _labels(files, tokens, origin)
    found = _npy_arrays(files, picked) if all(kind_of(file) == "npy" for file in files) else _named(files, picked)
    arrays = {hook: as_rows(array, labels.n_rows) for hook, array in found.items()}
    return Source(arrays, labels, _store_dtype(arrays, store_dtype), origin)


def _origin(files: Sequence[Path]) -> Origin | None:
    if not files:
        raise ConfigError("Name at least one file to import: .npy, .safetensors, .h5 or .hdf5.")
    found = [read_origin(file) for file in files if kind_of(file) == "hdf5"]
    if any(found) and len(files) > 1:
        raise ConfigError(f"{files[0]} and {len(files) - 1} more: a file that mi_pipe exported is imported alone.")
    return found[0] if found else None


def _check_names(hooks: Mapping[str, str], files: Sequence[Path]) -> None:
    if not hooks:
        names = [name for file in files for name in open_dump(file) if name]
        there = f" {files[0]} holds {', '.join(names)}." if names else ""
        raise ConfigError(f"Say which hook point the values are of, such as --hook blocks.3.hook_resid_post.{there}")
    for hook in hooks:
        if not _HOOK_NAME.fullmatch(hook) or hook in _TAKEN:
            raise ConfigError(f"{hook!r} cannot be the name of a hook point: letters, digits and . _ - : only.")


def _labels(files: Sequence[Path], tokens: Path | None, origin: Origin | None) -> RowLabels:
    if tokens is not None:
        return read_labels(tokens)
    if len(files) == 1 and kind_of(files[0]) == "hdf5":
        return read_labels(files[0], None if origin is None else origin.prompts)
    raise ConfigError("Say which token each row is: --tokens TABLE (.parquet or .csv) with prompt_idx, pos, token_id.")


def _npy_arrays(files: Sequence[Path], hooks: Mapping[str, str]) -> dict[str, DumpArray]:
    named = next((hook for hook, name in hooks.items() if name), None)
    if named is not None:
        raise ConfigError(f"--hook {named}={hooks[named]}: a .npy file holds one array without a name.")
    parts = [_only(file) for file in files]
    if len(hooks) == 1:
        return {hook: Concatenated(parts) for hook in hooks}
    if len(hooks) != len(files):
        raise ConfigError(
            f"{len(hooks)} hook points and {len(files)} .npy files: name one file a hook point, in order."
        )
    return dict(zip(hooks, parts, strict=True))


def _only(file: Path) -> DumpArray:
    arrays = open_dump(file)
    if not arrays:
        raise ConfigError(f"{file} holds no array with two or more axes.")
    return next(iter(arrays.values()))


def _named(files: Sequence[Path], hooks: Mapping[str, str]) -> dict[str, DumpArray]:
    dumps = {file: open_dump(file) for file in files}
    return {hook: Concatenated(_parts(dumps, hook, name, len(hooks))) for hook, name in hooks.items()}


def _parts(dumps: Mapping[Path, Mapping[str, DumpArray]], hook: str, name: str, n_hooks: int) -> list[DumpArray]:
    """Return a hook point's array in each of the files that have it."""
    wanted = name or hook
    parts = [arrays[wanted] for arrays in dumps.values() if wanted in arrays]
    if not parts and not name and n_hooks == 1 and all(len(arrays) == 1 for arrays in dumps.values()):
        parts = [next(iter(arrays.values())) for arrays in dumps.values()]
    if not parts:
        known = list(dict.fromkeys(key for arrays in dumps.values() for key in arrays))
        there = f"There are {', '.join(known)}; name one with --hook {hook}=NAME." if known else "There are no arrays."
        raise ConfigError(f"No file has an array {wanted!r}.{near_names(wanted, known)} {there}")
    return parts


def _store_dtype(arrays: Mapping[str, DumpArray], asked: StoreDType | None) -> StoreDType:
    """Return what was asked for, or a dtype that holds all values exactly; raises ConfigError if there is none."""
    found: set[StoreDType] = set()
    for array in arrays.values():
        if array.dtype is None:
            raise ConfigError(f"{array.label} holds no floating-point numbers of 16, 32 or 64 bits.")
        if asked is None and array.dtype not in _STORABLE:
            raise ConfigError(f"{array.label} holds float64, which is not stored; --store-dtype float32 rounds it.")
        found.add(_STORABLE.get(array.dtype, "float32"))
    return asked or (found.pop() if len(found) == 1 else "float32")
