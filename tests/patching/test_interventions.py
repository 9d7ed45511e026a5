"""Ablations of heads equal a loop of plain hooks; their values are of all pairs of a task, also of those not swept."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from mi_pipe.patching.chunks import take
from mi_pipe.patching.engine import PlainEngine, RestartEngine, make_engine
from mi_pipe.patching.interventions import Ablation, donor_groups, n_without_others
from mi_pipe.patching.runs import run_pairs
from mi_pipe.patching.sweep import sweep_layer
from mi_pipe.patching.units import hook_of
from tests.patching.conftest import make_model
from tests.patching.pairs import random_pairs

LAYER = 1
HOOK = hook_of("head_out", LAYER)
TASK = replace(random_pairs(n_pairs=5), sources=("a", "b", "a", "a", "b"))
SWEPT = take(TASK, np.array([0, 1]))


@pytest.fixture(params=["llama_gqa", "native_mlp"])
def model(request, models):
    if request.param not in models:
        models[request.param] = make_model(request.param)
    return models[request.param]


@torch.no_grad()
def z_of(model, tokens: torch.Tensor) -> torch.Tensor:
    seen = []
    with model.edited({HOOK: lambda value: seen.append(value.clone())}):
        model.logits(tokens)
    return seen[0].reshape(*tokens.shape, model.info.n_heads, -1)


def put_in(kind: str, z: torch.Tensor, pair: int, other: int) -> torch.Tensor:
    """Return what stands in the place of z (pos, head, d_head) of a pair, given those of all donor prompts."""
    if kind == "zero":
        return torch.zeros_like(z[0])
    if kind == "mean":
        return z.mean((0, 1)).expand_as(z[0])
    if kind == "resample":
        return z[other]
    return z[[i for i, source in enumerate(TASK.sources) if source == TASK.sources[pair]]].mean(0)


@torch.no_grad()
def by_hand(model, kind: str, others: list[int]) -> np.ndarray:
    donors = z_of(model, TASK.corrupted)
    found = np.zeros((SWEPT.n_pairs, model.info.n_heads))
    for pair, head in np.ndindex(*found.shape):
        new = put_in(kind, donors, pair, others[pair])

        def edit(value, new=new, head=head):
            parts = value.reshape(1, SWEPT.n_pos, model.info.n_heads, -1).clone()
            parts[0, :, head] = new[:, head]
            return parts.reshape(value.shape)

        with model.edited({HOOK: edit}):
            logits = model.logits(SWEPT.clean[pair : pair + 1])[0, -1]
        found[pair, head] = float(logits[SWEPT.answer[pair]] - logits[SWEPT.wrong[pair]])
    return found


@pytest.mark.parametrize("kind", ["zero", "mean", "mean_by_position", "resample"])
def test_ablated_heads_equal_a_loop_of_plain_hooks(model, kind):
    ablation = Ablation(kind, "noising", donor_groups(kind, [TASK], [SWEPT]), seed=3)
    runs = run_pairs(model, SWEPT, "noising", [HOOK], ablation=ablation)
    engine, _ = make_engine(model, runs)
    assert isinstance(engine, RestartEngine)
    others = [0, 0]
    if kind == "resample":
        drawn = ablation.tokens(SWEPT)
        others = [int((TASK.corrupted == row).all(1).nonzero()) for row in drawn]
        assert all(other != pair for pair, other in enumerate(others))
    wanted = by_hand(model, kind, others)
    scale = np.abs(wanted).max()
    for found in (
        sweep_layer(engine, "head_out", LAYER, 64),
        sweep_layer(PlainEngine(model, runs), "head_out", LAYER, 64),
    ):
        np.testing.assert_allclose(found, wanted, atol=1e-5 * scale)
    assert np.abs(wanted - runs.base_metric[:, None].numpy()).max() > 1e-3 * scale, "there is something to ablate"


def test_pairs_that_have_no_other_are_counted_among_all_donors():
    assert n_without_others("mean_by_position", [SWEPT], [SWEPT]) == 2
    assert n_without_others("mean_by_position", [SWEPT], [TASK]) == 0
    alone = take(TASK, np.array([4]))
    assert n_without_others("resample", [alone], [alone]) == 1
    assert n_without_others("resample", [alone], [TASK]) == 0
    assert n_without_others("mean", [alone], [alone]) == 0
