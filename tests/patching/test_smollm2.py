"""On the real model: equal to TransformerLens, and the known induction heads."""

import numpy as np
import pytest
import torch
from transformer_lens import patching as tl

from mi_pipe.attention.diagonals import SCORES
from mi_pipe.attention.repeats import measure_repeats, repeated_sequences
from mi_pipe.core.store import Store
from mi_pipe.models.handle import resolve_model
from mi_pipe.models.source import load_source
from mi_pipe.patching.engine import RestartEngine, make_engine
from mi_pipe.patching.metrics import logit_diff
from mi_pipe.patching.runs import run_pairs
from mi_pipe.patching.sweep import sweep_layer
from mi_pipe.patching.units import DEFAULT_UNITS as UNITS
from mi_pipe.patching.units import hook_of
from mi_pipe.prompts.prompt_set import PairGroup
from tests.patching.pairs import token_pairs

pytestmark = pytest.mark.real_model
LAYERS = (0, 17)
CLEAN = "When Mary and John went to the store, John gave a drink to"
CORRUPTED = "When Mary and John went to the store, Mary gave a drink to"


@pytest.fixture(scope="module")
def model():
    return load_source(resolve_model("smollm2-135m", Store()), device="cpu")


@pytest.fixture(scope="module")
def group(model) -> PairGroup:
    encode = model.vocabulary.encode
    return token_pairs(encode(CLEAN), encode(CORRUPTED), encode(" Mary")[0], encode(" John")[0])


def test_patching_equals_transformer_lens(model, group):
    runs = run_pairs(model, group, "denoising", [hook_of(unit, layer) for unit in UNITS for layer in LAYERS])
    engine, error = make_engine(model, runs)
    assert isinstance(engine, RestartEngine)
    assert "prefix" in engine.shortcuts
    assert error < 1e-5
    _, cache = model.bridge.run_with_cache(group.clean)
    scale = float(torch.stack([runs.base_metric, runs.donor_metric]).abs().max())
    largest = 0.0
    setters = {"head_out": (tl.layer_head_vector_patch_setter, "z", ["layer", "head_index"])}
    for unit in UNITS:
        setter, name, axes = setters.get(unit, (tl.layer_pos_patch_setter, unit, ["layer", "pos"]))
        n_columns = model.info.n_heads if unit == "head_out" else group.n_pos
        index = tl.make_df_from_ranges([model.info.n_layers, n_columns], axes)
        index = index[index["layer"].isin(LAYERS)].reset_index(drop=True)
        wanted = tl.generic_activation_patch(
            model.bridge,
            group.corrupted,
            cache,
            lambda logits: logit_diff(logits[:, -1], group.answer, group.wrong).mean(),
            setter,
            name,
            index_df=index,
        )
        found = [sweep_layer(engine, unit, layer, 2048)[0] for layer in LAYERS]
        largest = max(largest, float((torch.from_numpy(np.concatenate(found)) - wanted).abs().max()))
    assert largest <= 1e-5 * scale


def test_the_strongest_induction_heads_are_18_6_and_17_3(model):
    tokens = repeated_sequences(model.vocabulary, model.info, 4, 50, seed=0)
    results = measure_repeats(model, tokens, 50)
    induction = results.scores.mean(axis=0)[:, :, SCORES.index("induction")]
    best = induction.ravel().argsort()[::-1][:2]
    assert [divmod(int(i), model.info.n_heads) for i in best] == [(18, 6), (17, 3)]
    first, second = results.losses.mean(axis=0)
    assert second < first / 4
