"""A store for the tests of one module, and the toy with MLPs and a task in it that several stages are tested on."""

import pytest

from mi_pipe.core.store import Store
from mi_pipe.models.trained import TrainedModel
from mi_pipe.prompts.prompt_set import PromptSet
from tests.stages.toys import toy_model, toy_task


@pytest.fixture(scope="module")
def module_store(tmp_path_factory) -> Store:
    return Store(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def toy(module_store) -> tuple[TrainedModel, PromptSet]:
    model = toy_model(module_store, attn_only=False)
    return model, toy_task(module_store, model)
