"""Facts about the machine and the installed packages, as recorded in manifests."""

import importlib.metadata
import os
import platform

from mi_pipe.core.manifest import Scalar

_PACKAGES = (
    "mi-pipe",
    "torch",
    "transformers",
    "transformer-lens",
    "zarr",
    "numpy",
    "pandas",
    "pyarrow",
    "safetensors",
    "prefect",
)


def host_facts() -> dict[str, Scalar]:
    """Return system, processor, cores and Python version; no host name and no path."""
    return {
        "system": platform.system(),
        "machine": platform.machine(),
        "n_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "python": platform.python_version(),
    }


def package_versions() -> dict[str, str]:
    """Return the versions of the packages that results depend on, of those installed."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
