import pytest
import torch

from mi_pipe.core.errors import StageError
from mi_pipe.saes.batchtopk import BatchTopK
from mi_pipe.saes.code import SparseCode
from mi_pipe.saes.evaluation import evaluate_rows
from mi_pipe.saes.normalisation import Normaliser
from mi_pipe.saes.sweep import SAESpec
from mi_pipe.saes.trainer import initial_parameters
from tests.saes.planted import make_group, planted, train

HOOK = "blocks.0.hook_resid_post"


@pytest.mark.parametrize("architecture", ["topk", "batchtopk"])
def test_planted_features_are_recovered(architecture):
    rows, dictionary = planted(8192, d_in=32, n_features=48, n_active=3)
    spec = SAESpec(HOOK, architecture, 3, 96, 0)
    group = make_group(rows, [spec], n_steps=400, batch_rows=256, lr=6e-3)
    curve = train(group, rows, 400, 256)
    sae = group.folded()[spec.name]
    matched = (dictionary @ sae.W_dec.T).max(1).values
    assert matched.min() > 0.95
    figures = evaluate_rows(sae, [rows])
    assert figures.fvu < 0.1
    assert figures.l0 == pytest.approx(3, rel=0.2)
    assert curve[-1]["fvu"] == pytest.approx(figures.fvu, rel=0.35)


def test_an_sae_of_a_group_equals_one_trained_alone():
    rows, _ = planted(512, d_in=8, n_features=12, n_active=2)
    specs = [SAESpec(HOOK, "topk", 2, 24, 0), SAESpec(HOOK, "batchtopk", 3, 24, 0), SAESpec(HOOK, "topk", 2, 48, 1)]
    group = make_group(rows, specs, 30, 64)
    train(group, rows, 30, 64)
    for spec in specs:
        alone = make_group(rows, [spec], 30, 64)
        train(alone, rows, 30, 64)
        for name, value in alone.trainers[spec.name].params.named().items():
            assert torch.equal(value, group.trainers[spec.name].params.named()[name]), (spec.name, name)


def test_training_curve_states_fvu_over_the_interval():
    rows, _ = planted(512, d_in=8, n_features=12, n_active=2)
    spec = SAESpec(HOOK, "topk", 2, 24, 0)
    group = make_group(rows, [spec], 40, 64, auxk_coefficient=0.0)
    curve = train(group, rows, 40, 64, log_steps=25)
    assert [row["step"] for row in curve] == [25, 40]
    assert [row["tokens"] for row in curve] == [1600, 2560]
    assert curve[0]["loss"] == pytest.approx(curve[0]["fvu"], rel=0.1)
    assert curve[1]["l0"] <= 2


def test_auxk_brings_dead_features_back():
    rows, _ = planted(4096, d_in=16, n_features=24, n_active=3)

    def dead_after(coefficient):
        spec = SAESpec(HOOK, "topk", 3, 64, 0)
        group = make_group(rows, [spec], 400, 128, auxk_coefficient=coefficient)
        group.trainers[spec.name].params.b_enc[:48] = -3.0
        return train(group, rows, 400, 128)[-1]["dead_fraction"]

    without = dead_after(0.0)
    assert without > 0.4
    assert dead_after(1 / 32) < 0.85 * without


def test_a_loss_that_is_not_finite_stops_the_training_with_the_sae_named():
    rows, _ = planted(512, d_in=8, n_features=12, n_active=2)
    spec = SAESpec(HOOK, "topk", 2, 24, 0)
    group = make_group(rows, [spec], 10, 64)
    rows[0] = torch.inf
    with pytest.raises(StageError, match=r"L0\.resid_post\.topk.*Lower the learning rate"):
        list(group.train(iter([rows] * 10), 0, 10, 5))


def test_folded_sae_equals_the_normalised_one():
    rows, _ = planted(256, d_in=8, n_features=12, n_active=2)
    params = initial_parameters(8, 24, 0)
    params.b_enc += 0.1
    params.b_dec += 0.2
    mean = rows.mean(0)
    normaliser = Normaliser.from_moments(mean.double(), float((rows - mean).square().sum(1).mean()))
    x = normaliser(rows)
    assert float(x.square().sum(1).mean()) == pytest.approx(8, rel=1e-4)
    architecture = BatchTopK(3, 10)
    architecture.observe(SparseCode.from_rows(torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, 1), 24))
    sae = normaliser.fold(params, architecture.rule())
    pre = (x - params.b_dec) @ params.W_enc.T + params.b_enc
    z = torch.where(pre > 1.0, pre, 0.0)
    torch.testing.assert_close(sae.encode(rows) * normaliser.scale, z, rtol=1e-3, atol=1e-3)
    expected = (z @ params.W_dec + params.b_dec) / normaliser.scale + mean
    torch.testing.assert_close(sae(rows), expected, rtol=1e-4, atol=1e-3)


def test_constant_activations_are_refused():
    with pytest.raises(StageError, match="do not vary"):
        Normaliser.from_moments(torch.ones(4), 0.0, HOOK)


def test_batchtopk_threshold_is_the_bias_corrected_running_mean():
    architecture = BatchTopK(1, 1000)

    def code(smallest):
        return SparseCode.from_rows(torch.zeros(1, 2, dtype=torch.int32), torch.tensor([[smallest, 9.0]]), 4)

    assert architecture.threshold == 0
    mean = 0.0
    for step, smallest in enumerate([2.0, 4.0, 3.0], start=1):
        architecture.observe(code(smallest))
        mean = 0.99 * mean + 0.01 * smallest
        assert float(architecture.threshold) == pytest.approx(mean / (1 - 0.99**step))
    architecture.observe(code(0.0))
    assert float(architecture.threshold) > 2
