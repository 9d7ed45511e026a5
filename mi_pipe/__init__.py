"""mi_pipe: overnight mechanistic interpretability as a pipeline of batch stages with stored data sets.

`mi_pipe.open(id)` reads any stored result, `mi_pipe.load_model(name)` loads a model, `mi_pipe.steer` writes texts under
a direction. Importing this package loads nothing heavy.
"""

from importlib import metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mi_pipe.opening import load_model
    from mi_pipe.opening import open_artifact as open  # noqa: A004 (the public name)
    from mi_pipe.steering.steer import steer

__all__ = ["__version__", "load_model", "open", "steer"]
__version__ = metadata.version("mi-pipe")


def __getattr__(name: str) -> Any:
    if name == "open":
        from mi_pipe.opening import open_artifact

        return open_artifact
    if name == "load_model":
        from mi_pipe.opening import load_model

        return load_model
    if name == "steer":
        from mi_pipe.steering.steer import steer

        return steer
    raise AttributeError(f"module 'mi_pipe' has no attribute {name!r}")
