"""The read side of an artifact: what it is, its files, and whether they are still what was published."""

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mi_pipe.core.atomic import write_bytes
from mi_pipe.core.checksum import matches_once
from mi_pipe.core.damage import Damage, find_damage
from mi_pipe.core.destination import artifact_url, destination_of, place_of
from mi_pipe.core.errors import ArtifactDamagedError
from mi_pipe.core.manifest import InputRef, Manifest, Scalar, damage_text, read_manifest
from mi_pipe.core.place import LocalPlace, Place

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor


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
    def source(self) -> dict[str, Scalar]:
        """Its URL if it lies in an object store, where it is found by those whose store does not have it."""
        destination = destination_of(self.manifest.execution)
        return {} if destination is None else {"url": artifact_url(destination, self.id)}

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
        """Return the path of one file of the artifact, compared with its checksum once a process.

        Raises ArtifactDamagedError if it is not listed, missing, or differs. A file that lies in an object store is
        fetched first. The comparison reads the whole file, at about 1 GB/s.
        """
        path, checksum = self.path / name, self._checksum(name)
        if not path.exists() and not isinstance(self.place, LocalPlace):
            self.check_file(name)
            write_bytes(path, self.place.read(name))
        if not matches_once(LocalPlace(self.path), name, checksum):
            raise self._damaged(name, path.exists())
        return path

    def check_file(self, name: str) -> None:
        """Compare one file with its checksum where it lies, once a process; raises ArtifactDamagedError."""
        if not matches_once(self.place, name, self._checksum(name)):
            raise self._damaged(name, self.place.size(name) is not None)

    def zarr_group(self, folder: str) -> Any:
        """Return a Zarr group of the artifact as a store for zarr-python and xarray in which damage raises."""
        from mi_pipe.core.checked_zarr import checked_store

        prefix = f"{folder}/"
        names = (name for name in self.manifest.files if name.startswith(prefix))
        checksums = {name.removeprefix(prefix): self.manifest.files[name].checksum for name in names}
        return checked_store(self.place.within(folder), checksums, self.id)

    def _checksum(self, name: str) -> str:
        if name not in self.manifest.files:
            raise ArtifactDamagedError(damage_text(self.id, f"it has no file {name}"))
        return self.manifest.files[name].checksum

    def _damaged(self, name: str, exists: bool) -> ArtifactDamagedError:
        return ArtifactDamagedError(
            damage_text(self.id, f"{name} {'differs from its checksum' if exists else 'is missing'}")
        )

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
        """Return the files that are not what was published (reads everything); `mi_pipe.verifying` says more."""
        return [damage.file for damage in find_damage(self, deep=True)]

    def check(self) -> None:
        """Compare every file with its checksum; raises ArtifactDamagedError naming the first that differs."""
        for damage in find_damage(self, deep=True):
            raise ArtifactDamagedError(damage_text(self.id, str(damage)))

    def content_of(self, name: str) -> str:
        """Say what a file holds, where its name does not say it; never raises."""
        del name
        return ""

    def disagreements(self) -> list[Damage]:
        """Return the files that contradict one another, without reading the large ones; never raises."""
        return []

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
