"""Notebooks as readers run them: from an empty store, and again on what is there; committed without outputs."""

import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from mi_pipe.core.store import Store

FOLDER = Path(__file__).parent.parent.parent / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def execute(path: Path) -> list[dict]:
    """Run a notebook in a kernel of its own; return its cells' outputs."""
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": path.parent}}
    ).execute()
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


@pytest.fixture
def quiet_kernels(tmp_path, monkeypatch):
    for name in ("JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "IPYTHONDIR", "PREFECT_HOME"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")


@pytest.mark.usefixtures("quiet_kernels")
def test_activations_in_pandas_runs_on_a_store_of_its_own_and_on_one_that_is_there(store):
    path = FOLDER / "activations_in_pandas.ipynb"
    outputs = execute(path)
    made = store.published_ids()
    assert [name.rpartition("-")[0] for name in made] == ["train_model", "generate_prompts", "harvest"]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    shown = [output["data"]["text/plain"] for output in outputs if "data" in output]
    assert any(made[-1] in text for text in shown)
    assert any(text.endswith("True)") for text in shown), "plain xarray and mi_pipe read the same rows"
    execute(path)
    assert Store(store.root).published_ids() == made, "a store with a harvest is read, not added to"


@pytest.mark.usefixtures("quiet_kernels")
def test_seed_questions_are_answered_on_toys_made_in_place(store):
    outputs = execute(FOLDER / "seed_questions.ipynb")
    kinds = [name.rpartition("-")[0] for name in store.published_ids()]
    assert sorted(kinds) == ["generate_prompts"] * 2 + ["harvest"] * 2 + ["train_model"] * 2
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 3
    shown = [output["data"]["text/plain"] for output in outputs if "data" in output]
    assert any(text.startswith("'CKA 0.") for text in shown)
    assert any(text.endswith("True)") for text in shown), "the store and the model that runs find the same head"


def test_they_are_committed_without_outputs_or_paths():
    assert NOTEBOOKS
    for path in NOTEBOOKS:
        notebook = nbformat.read(path, as_version=4)
        nbformat.validate(notebook)
        for cell in notebook.cells:
            assert not cell.get("outputs"), path
            assert cell.get("execution_count") is None, path
        assert os.fspath(FOLDER.parent) not in path.read_text()
