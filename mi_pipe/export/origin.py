"""What an HDF5 file that mi_pipe exported says of the store it was made from, so that it comes back as it was."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pandas as pd

from mi_pipe.core.errors import ArtifactDamagedError
from mi_pipe.export.hdf5 import ACTIVATIONS, COVARIANCE, PROMPTS, SCHEMA, STATISTICS
from mi_pipe.export.hdf5_table import read_table


@dataclass(frozen=True)
class Origin:
    """The store that a file was exported from."""

    id: str
    digest: str
    model: str
    prompts_id: str
    hooks: dict[str, str]
    """Hook point to the path of its data set in the file."""
    token_shapes: dict[str, tuple[int, ...]]
    dimensions: dict[str, str]
    shard_rows: int
    massive_factor: float
    with_covariance: frozenset[str]
    precision: dict[str, Any]
    prompts: pd.DataFrame


def read_origin(path: Path) -> Origin | None:
    """Return what a file says, None if mi_pipe did not write it; raises ArtifactDamagedError if a part is missing."""
    import h5py

    try:
        with h5py.File(path, "r") as file:
            return _origin(file) if file.attrs.get("schema") == SCHEMA else None
    except OSError:
        return None
    except (KeyError, ValueError) as error:
        raise ArtifactDamagedError(f"{path} is an export of mi_pipe that lacks a part ({error}).") from error


def _origin(file: Any) -> Origin:
    attributes = {name: file.attrs[name] for name in file.attrs}
    hooks = {str(hook): f"{ACTIVATIONS}/{hook}" for hook in attributes["hooks"]}
    return Origin(
        id=str(attributes["id"]),
        digest=str(attributes["digest"]),
        model=str(attributes["model"]),
        prompts_id=str(attributes["prompts"]),
        hooks=hooks,
        token_shapes={hook: tuple(map(int, file[path].attrs["token_shape"])) for hook, path in hooks.items()},
        dimensions={hook: str(file[path].dims[1].label) for hook, path in hooks.items()},
        shard_rows=int(attributes["shard_rows"]),
        massive_factor=float(attributes["massive_factor"]),
        with_covariance=frozenset(hook for hook in hooks if COVARIANCE in file[f"{STATISTICS}/{hook}"]),
        precision=json.loads(cast(str, attributes["precision"])),
        prompts=read_table(file[PROMPTS]).to_pandas(),
    )
