"""The tiny models of the patching tests."""

import pytest

from mi_pipe.models.model import Model
from tests.patching.conftest import make_model, model, models

__all__ = ["llama", "model", "models"]


@pytest.fixture(scope="session")
def llama(models) -> Model:
    """A Llama with grouped queries."""
    if "llama_gqa" not in models:
        models["llama_gqa"] = make_model("llama_gqa")
    return models["llama_gqa"]
