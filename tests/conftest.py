"""Every test works in its own store, quietly, with one thread, and with a Prefect home of its own."""

import os
import tempfile

import pytest

pytest_plugins = ["tests.faults.object_store"]

# Scripts that tests run in a Python of their own, not modules to look for doctests in.
collect_ignore = [
    "activations/read_without_mi_pipe.py",
    "export/read_with_saelens.py",
    "saes/triton_compiled.py",
    "saes/triton_interpreted.py",
]

os.environ.setdefault("OMP_NUM_THREADS", "1")

# One for each process: pytest-xdist runs several at once. It goes when this object does, at the process' end.
_PREFECT_HOME = tempfile.TemporaryDirectory(prefix="mi-pipe-prefect-", ignore_cleanup_errors=True)
os.environ["PREFECT_HOME"] = _PREFECT_HOME.name
os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")


@pytest.fixture(autouse=True)
def _own_store(tmp_path, monkeypatch):
    monkeypatch.setenv("MI_PIPE_STORE", str(tmp_path / "store"))


@pytest.fixture
def store(tmp_path):
    from mi_pipe.core.store import Store

    return Store(tmp_path / "store")


@pytest.fixture(scope="session")
def smollm2():
    """The real model, from the store of this checkout or of MI_PIPE_TEST_MODELS; skipped where it was not pulled."""
    from pathlib import Path

    from mi_pipe.core.store import Store
    from mi_pipe.models.handle import resolve_model

    root = os.environ.get("MI_PIPE_TEST_MODELS") or Path(__file__).parent.parent / "data" / "store"
    store = Store(root)
    if not (store.models / "smollm2-135m" / "config.json").exists():
        pytest.skip("needs `mi-pipe models pull smollm2-135m`")
    return resolve_model("smollm2-135m", store, device="cpu")
