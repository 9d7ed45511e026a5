"""The read side of an artifact: what it is, its files, and whether they are still what was published."""

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mi_pipe.core.atomic import write_bytes
from mi_pipe.core.destination import place_of
from mi_pipe.core.errors import ArtifactDamagedError
from mi_pipe.core.manifest import InputRef, Manifest, Scalar, damage_text, digest_of, read_manifest
from mi_pipe.core.place import LocalPlace, Place

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

_BLOCK_BYTES = 1 << 22


class Artifact:
    """A published, read-only result. Each stage has a subclass with its own readers."""

    def __init__(self, path: Path, manifest: Manifest | None = None) -> None:
        """Open the artifact folder at `path`; raises as `read_manifest` does."""
        self.path = path
        self.manifest = manifest or read_manifest(path)

    @cached_property
    def place(self) -> Place:
        """Where the large files lie: this folder, or the object store that the stage wrote to."""
        return place_of(self.manifest, self.path)

    def __reduce__(self) -> tuple[Any, ...]:
        """Travel to other processes as the path alone."""
        return type(self), (self.path,)

    @property
    def id(self) -> str:
        """`<stage>-<hex>`."""
        return self.manifest.id

    @property
    def digest(self) -> str:
        """Hash of the content."""
        return self.manifest.digest

    @property
    def config(self) -> dict[str, Any]:
        """The config fields that decided the result."""
        return self.manifest.config

    @property
    def inputs(self) -> dict[str, InputRef]:
        """The inputs by role."""
        return self.manifest.inputs

    @property
    def summary(self) -> dict[str, Scalar]:
        """The main figures."""
        return self.manifest.summary

    @cached_property
    def size_bytes(self) -> int:
        """Bytes of all files."""
        return self.manifest.size_bytes

    def file(self, name: str) -> Path:
        """Return the path of one file of the artifact; raises ArtifactDamagedError if it is not listed."""
        if name not in self.manifest.files:
            raise ArtifactDamagedError(damage_text(self.id, f"it has no file {name}"))
        path = self.path / name
        if not path.exists() and not isinstance(self.place, LocalPlace):
            write_bytes(path, self.place.read(name))
            if not matches(LocalPlace(self.path), name, self.manifest.files[name].checksum):
                path.unlink()
                raise ArtifactDamagedError(damage_text(self.id, f"{name} of {self.place.url} is not what it was"))
        return path

    def read_table(self, name: str, columns: list[str] | None = None) -> "pd.DataFrame":
        """Read a Parquet table of the artifact, or some of its columns."""
        import pandas as pd

        return pd.read_parquet(self.file(name), columns=columns)

    def read_tensors(self, name: str) -> "dict[str, Tensor]":
        """Read a safetensors file of the artifact."""
        from safetensors.torch import load_file

        return load_file(self.file(name))

    def read_json(self, name: str) -> Any:
        """Read a JSON file of the artifact."""
        import json

        return json.loads(self.file(name).read_text(encoding="utf-8"))

    def damaged_files(self) -> list[str]:
        """Return the files whose content differs from the manifest's checksum (reads everything)."""
        return [name for name, entry in self.manifest.files.items() if not matches(self.place, name, entry.checksum)]

    def check(self) -> None:
        """Compare every file with its checksum; raises ArtifactDamagedError naming the first that differs."""
        if digest_of(self.manifest.files) != self.digest:
            raise ArtifactDamagedError(damage_text(self.id, "its manifest was changed"))
        for name in self.damaged_files():
            raise ArtifactDamagedError(damage_text(self.id, f"{name} differs from its checksum"))

    def __repr__(self) -> str:
        """Name the artifact, its size and its main figures."""
        figures = ", ".join(f"{name}={_short(value)}" for name, value in self.summary.items())
        return f"<{type(self).__name__} {self.id}: {format_size(self.size_bytes)}{'; ' if figures else ''}{figures}>"

    def _repr_html_(self) -> str:
        import html

        rows = "".join(
            f"<tr><th>{html.escape(name)}</th><td>{html.escape(_short(value))}</td></tr>"
            for name, value in {"id": self.id, "size": format_size(self.size_bytes), **self.summary}.items()
        )
        return f"<table>{rows}</table>"


def matches(place: Place, name: str, checksum: str) -> bool:
    """Say whether a file exists and has the checksum (`crc32c:…` or `sha256:…`); reads all of it."""
    import hashlib

    import google_crc32c

    algorithm, _, value = checksum.partition(":")
    hasher = google_crc32c.Checksum() if algorithm == "crc32c" else hashlib.sha256()
    try:
        with place.open(name) as file:
            block = bytearray(min(_BLOCK_BYTES, max(1, file.size)))
            for start in range(0, file.size, len(block)):
                n_read = file.read_into([memoryview(block)], start)
                hasher.update(bytes(block[:n_read]))
    except FileNotFoundError:
        return False
    found = hasher.hexdigest()
    return (found if isinstance(found, str) else found.decode()) == value


def _short(value: Scalar) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def format_size(n_bytes: float) -> str:
    """Write a number of bytes in decimal units.

    >>> format_size(1_234_567)
    '1.23 MB'
    """
    step = 1000
    for unit in ("B", "kB", "MB", "GB"):
        if n_bytes < step:
            return f"{n_bytes:.3g} {unit}"
        n_bytes /= step
    return f"{n_bytes:.3g} TB"
