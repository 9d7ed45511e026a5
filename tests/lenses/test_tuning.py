"""Training of translators: the gradient put in by hand, chunks of rows, and a state that is all of it."""

import numpy as np
import pytest
import torch

from mi_pipe.lenses import tuning as module
from mi_pipe.lenses.config import TunedLensConfig
from mi_pipe.lenses.final_layers import FinalLayers
from mi_pipe.lenses.tuning import Tuning, Units
from mi_pipe.lenses.tuning_rows import RowBatch
from tests.stages.toys import toy_model

D, N = 32, 50


@pytest.fixture
def final(store):
    return FinalLayers(toy_model(store).load("cpu"))


def batch_of(seed: int) -> RowBatch:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(N, D, generator=generator) * torch.linspace(0.1, 30, D) + 5
    mixed = x @ (torch.eye(D) + 0.05 * torch.randn(D, D, generator=torch.Generator().manual_seed(9))).T
    rows = np.arange(N)
    return RowBatch(rows, rows // 5, torch.full((N,), -1), {1: x}, mixed)


def units() -> dict[int, Units]:
    x = batch_of(0).residuals[1]
    return {1: Units(x.mean(0), x.std(0))}


def test_one_step_is_adam_on_the_kl_whatever_the_chunks(final, monkeypatch):
    config = TunedLensConfig(n_steps=10, lr=0.01)
    batch = batch_of(1)
    made = []
    for entries in (1 << 24, 64 * 7):
        monkeypatch.setattr(module, "CHUNK_ENTRIES", entries)
        tuning = Tuning(final, units(), config)
        losses = [tuning.step(batch)[0] for _ in range(2)]
        made.append((tuning.translators[1].weight.detach(), losses))
    scale, mean = units()[1].deviation, units()[1].mean
    weight = torch.zeros(D, D, requires_grad=True)
    bias = torch.zeros(D, requires_grad=True)
    adam = torch.optim.Adam([weight, bias])
    wanted = []
    for step in range(2):
        x = batch.residuals[1]
        lens = final.logits(x + scale * (((x - mean) / scale) @ weight.T + bias)).log_softmax(-1)
        loss = torch.nn.functional.kl_div(
            lens, final.logits(batch.last).log_softmax(-1), log_target=True, reduction="batchmean"
        )
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([weight, bias], 1.0)
        adam.param_groups[0]["lr"] = 0.01 * (1 - step / 10)
        adam.step()
        wanted.append(loss.item())
    for found, losses in made:
        torch.testing.assert_close(found, weight.detach(), rtol=1e-3, atol=2e-5)
        assert losses == pytest.approx(wanted, rel=1e-5)


def test_the_best_moment_is_kept_so_that_tuning_never_loses_to_the_logit_lens(final):
    config = TunedLensConfig(n_steps=4, checkpoint_steps=2, lr=1e3)
    tuning = Tuning(final, units(), config)
    held = [batch_of(2)]
    tuning.validate(held, None)
    for _ in range(4):
        tuning.step(batch_of(1))
        if tuning.step_no % 2 == 0:
            tuning.validate(held, [0.0])
    assert tuning.validation_kl[-1, 0] > tuning.validation_kl[0, 0], "a rate this large ruins it"
    best = tuning.best()[1]
    assert not best.weight.any()
    assert not best.bias.any()


def test_a_training_that_breaks_down_keeps_the_logit_lens_and_goes_on_where_it_was(final):
    config = TunedLensConfig(n_steps=2, checkpoint_steps=1, lr=1e30)
    tuning = Tuning(final, units(), config)
    tuning.validate([batch_of(2)], None)
    tuning.step(batch_of(1))
    tuning.validate([batch_of(2)], [0.0])
    assert not torch.isfinite(tuning.validation_kl[1, 0])
    again = Tuning(final, units(), config)
    again.load(tuning.state())
    assert again.n_validated == tuning.n_validated == 2
    assert not again.best()[1].weight.any()


def test_a_state_read_back_goes_on_bit_for_bit(final):
    config = TunedLensConfig(n_steps=8, checkpoint_steps=4, lr=0.01)
    whole, first, second = (Tuning(final, units(), config) for _ in range(3))
    for tuning, steps in ((whole, range(8)), (first, range(4))):
        for step in steps:
            tuning.step(batch_of(step))
    second.load(first.state())
    for step in range(4, 8):
        second.step(batch_of(step))
    for mine, theirs in zip(whole.translators[1].parameters, second.translators[1].parameters, strict=True):
        assert torch.equal(mine, theirs)


def test_a_folded_translator_is_the_trained_one_on_raw_vectors(final):
    tuning = Tuning(final, units(), TunedLensConfig(n_steps=3, lr=0.05))
    for step in range(3):
        tuning.step(batch_of(step))
    trained = tuning.translators[1]
    x = batch_of(7).residuals[1]
    with torch.no_grad():
        torch.testing.assert_close(trained.folded(*trained.parameters)(x), trained(x), rtol=1e-4, atol=1e-3)
