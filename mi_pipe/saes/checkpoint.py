"""Checkpoints of a training group: a safetensors file and a JSON file that names it, each replaced whole.

`checkpoint.json` {step, file, rows} is written after the tensors and points to them, so a kill between the two
leaves the older pair in force. Only the newest pair is kept.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from mi_pipe.core import atomic

_POINTER = "checkpoint.json"


@dataclass(frozen=True)
class Checkpoint:
    """Where a training stood: steps done, tensors by name, rows of the training curve so far."""

    step: int
    tensors: dict[str, Tensor]
    rows: dict[str, Any]


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint durably and remove the one before."""
    file = f"step-{checkpoint.step:09d}.safetensors"
    with atomic.atomic_path(folder / file) as temp:
        save_file({name: value.detach().cpu().contiguous() for name, value in checkpoint.tensors.items()}, temp)
    atomic.write_json(folder / _POINTER, {"step": checkpoint.step, "file": file, "rows": checkpoint.rows})
    for old in folder.glob("step-*.safetensors"):
        if old.name != file:
            old.unlink()


def drop_checkpoint(folder: Path) -> None:
    """Remove the checkpoint of a training that is finished."""
    (folder / _POINTER).unlink(missing_ok=True)
    for old in folder.glob("step-*.safetensors"):
        old.unlink()


def load_checkpoint(folder: Path) -> Checkpoint | None:
    """Read the newest checkpoint, or return None if there is none."""
    if not (folder / _POINTER).exists():
        return None
    pointer = json.loads((folder / _POINTER).read_text(encoding="utf-8"))
    return Checkpoint(pointer["step"], load_file(folder / pointer["file"]), pointer["rows"])
