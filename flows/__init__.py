"""The top floor: Prefect flows and the command line; the only code that knows Prefect.

`flows.run` makes a recipe in one call. Importing this package loads nothing heavy.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flows.call import run

__all__ = ["run"]


def __getattr__(name: str) -> Any:
    if name == "run":
        from flows.call import run

        return run
    raise AttributeError(f"module 'flows' has no attribute {name!r}")
