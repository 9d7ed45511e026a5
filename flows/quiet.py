"""Settings that keep Prefect quiet and at home: no telemetry, patience with a cold embedded server.

Call `quiet` before Prefect is imported. Variables that the user has set stay as they are.
"""

import os

_SETTINGS = {
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
    "PREFECT_LOGGING_LEVEL": "WARNING",
    "PREFECT_SERVER_LOGGING_LEVEL": "CRITICAL",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "true",
}


def quiet() -> None:
    """Set the defaults."""
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    import warnings

    warnings.filterwarnings("ignore", message=".*Consolidated metadata.*")
