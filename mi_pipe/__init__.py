"""mi_pipe: overnight mechanistic interpretability as a pipeline of batch stages with stored data sets.

`mi_pipe.open(id)` reads any stored result. Importing this package loads nothing heavy.
"""

from importlib import metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mi_pipe.opening import open_artifact as open  # noqa: A004 (the public name)

__all__ = ["__version__", "open"]
__version__ = metadata.version("mi-pipe")


def __getattr__(name: str) -> Any:
    if name == "open":
        from mi_pipe.opening import open_artifact

        return open_artifact
    raise AttributeError(f"module 'mi_pipe' has no attribute {name!r}")
