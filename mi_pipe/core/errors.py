"""Errors that a user can cause, each one clear sentence with what to do next.

Every class is a `MiPipeError` and also the builtin that fits, so that library users can catch either.
`exit_code` is what the command line returns: 2 for a mistake in what was asked, 1 for a run that failed.
"""

import difflib
from collections.abc import Iterable


class MiPipeError(Exception):
    """Base of all errors that mi_pipe raises on purpose; its text is shown without a traceback."""

    exit_code = 1


class ConfigError(MiPipeError, ValueError):
    """A recipe, an override or a stage config is wrong."""

    exit_code = 2


class HookPointError(MiPipeError, LookupError):
    """A hook point does not exist in the model."""

    exit_code = 2


class ModelError(MiPipeError, OSError):
    """A model cannot be found or loaded."""

    exit_code = 2


class PromptError(MiPipeError, ValueError):
    """Prompts cannot be read, or cannot be expressed with the model's tokenizer."""

    exit_code = 2


class ArtifactNotFoundError(MiPipeError, LookupError):
    """No artifact has this id."""

    exit_code = 2


class ArtifactIncompleteError(MiPipeError, RuntimeError):
    """The artifact was begun and has no manifest yet."""


class ArtifactDamagedError(MiPipeError, RuntimeError):
    """A published artifact no longer matches its manifest."""


class ArtifactLockedError(MiPipeError, BlockingIOError):
    """Another process is writing the artifact."""


class DiskSpaceError(MiPipeError, OSError):
    """The store's disk is too small for what the stage will write."""


class PlaceError(MiPipeError, OSError):
    """An object store cannot be reached or refuses."""


class StageError(MiPipeError, RuntimeError):
    """A stage cannot continue; what it had finished stays."""


def near_names(name: str, known: Iterable[str], n: int = 3) -> str:
    """Return a phrase with the known names nearest to `name`: " Did you mean 'a' or 'b'?", or "".

    >>> near_names("harvets", ["harvest", "heads"])
    " Did you mean 'harvest'?"
    """
    found = difflib.get_close_matches(name, list(known), n=n, cutoff=0.6)
    return f" Did you mean {' or '.join(map(repr, found))}?" if found else ""
