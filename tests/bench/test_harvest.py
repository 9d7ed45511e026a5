"""The harvest's benchmark runs what it compares, on the same tokens, and measures the memory of the child alone."""

import numpy as np
import pytest

from bench.harvest.__main__ import speed_figures
from bench.harvest.memory import peak_bytes
from bench.harvest.models import Sizes, save_model
from bench.harvest.prompts import publish_prompts, random_tokens
from bench.harvest.saelens import PYTHON_VARIABLE
from bench.harvest.subject import Subject
from mi_pipe.core.store import Store
from mi_pipe.models.handle import resolve_model
from stages.harvest_plan import HarvestConfig, Inputs

SIZES = Sizes(n_layers=3, d_model=32, n_heads=4, d_vocab=100, n_ctx=16)
HOOK = "blocks.1.hook_resid_post"


def test_every_figure_is_there(tmp_path, monkeypatch):
    monkeypatch.delenv(PYTHON_VARIABLE, raising=False)
    found = {name: value for figure in speed_figures(512, 1, [HOOK], tmp_path, SIZES) for name, value in figure.items()}
    assert {"of_bare_forward", "of_bare_forward_float32", "of_transformer_lens_npy", "tokens_per_s"} < set(found)
    assert found["of_saelens"] is None
    assert PYTHON_VARIABLE in found["reason"]
    assert all(speed > 0 for speed in found["tokens_per_s"].values())


@pytest.fixture
def subject(tmp_path):
    store = Store(tmp_path / "store")
    prompts = publish_prompts(store, random_tokens(8, SIZES.n_ctx, SIZES.d_vocab), SIZES.d_vocab)
    model = resolve_model(str(save_model(tmp_path / "hf", SIZES)), store, device="cpu")
    return Subject(HarvestConfig(hooks=[HOOK], device="cpu"), Inputs(model, prompts), tmp_path)


def test_all_run_the_same_layers_on_the_same_tokens(subject, monkeypatch):
    seen, written = {}, []
    blocks, save = list(subject._model.blocks), np.save
    monkeypatch.setattr(np, "save", lambda path, values: (written.append(values), save(path, values)))
    for i, block in enumerate(blocks):
        block.register_forward_pre_hook(lambda _, args, i=i: seen.setdefault(i, []).append(args[0].shape[:2].numel()))
    for way in (subject.bare, subject.harvest):
        seen.clear()
        assert way().wall > 0
        assert {i: sum(counts) for i, counts in seen.items()} == {0: 128, 1: 128}
    subject.transformer_lens()
    assert sum(len(values) for values in written) == 128
    assert list(subject._model.blocks) == blocks, "the layers that were taken off are back"


def test_memory_is_that_of_the_child_alone(tmp_path):
    ballast = np.ones(1 << 28, np.uint8)  # what getrusage would report for the child too
    alone = peak_bytes(256, tmp_path / "a")
    del ballast
    assert alone > 1e8
    assert peak_bytes(256, tmp_path / "b") == pytest.approx(alone, rel=0.1)
