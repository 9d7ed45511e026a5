import pytest
import torch

from mi_pipe.core.errors import StageError
from mi_pipe.saes.architectures.threshold_mean import ThresholdMean
from mi_pipe.saes.evaluation import evaluate_rows
from mi_pipe.saes.normalisation import Normaliser
from mi_pipe.saes.step import Batch
from tests.saes.planted import HOOK, make_group, planted, spec_of, train


@pytest.mark.parametrize("architecture", ["topk", "batchtopk"])
def test_planted_features_are_recovered(architecture):
    rows, dictionary = planted(8192, d_in=32, n_features=48, n_active=3)
    spec = spec_of(architecture, 32, 3, 96)
    group = make_group(rows, [spec], n_steps=400, batch_rows=256, lr=6e-3)
    curve = train(group, rows, 400, 256)
    sae = dict(group.folded())[spec.name]
    matched = (dictionary @ sae.W_dec.T).max(1).values
    assert matched.min() > 0.95
    figures = evaluate_rows(sae, [Batch.of(rows)]).figures
    assert figures.fvu < 0.1
    assert figures.l0 == pytest.approx(3, rel=0.2)
    assert curve[-1]["fvu"] == pytest.approx(figures.fvu, rel=0.35)


def test_an_sae_of_a_group_equals_one_trained_alone():
    rows, _ = planted(512, d_in=8, n_features=12, n_active=2)
    specs = [spec_of(name, 8, 2, 24) for name in ARCHITECTURES] + [spec_of("topk", 8, 2, 48, seed=1)]
    group = make_group(rows, specs, 30, 64)
    train(group, rows, 30, 64)
    for spec in specs:
        alone = make_group(rows, [spec], 30, 64)
        train(alone, rows, 30, 64)
        for name, value in alone.trainers[spec.name].params.named().items():
            assert torch.equal(value, group.trainers[spec.name].params.named()[name]), (spec.name, name)


ARCHITECTURES = ("standard", "topk", "batchtopk", "jumprelu", "gated", "matryoshka", "p_anneal")


def test_training_curve_states_fvu_over_the_interval():
    rows, _ = planted(512, d_in=8, n_features=12, n_active=2)
    spec = spec_of("topk", 8, 2, 24)
    group = make_group(rows, [spec], 40, 64, log_steps=25, dead_features={"auxk_coefficient": 0})
    curve = train(group, rows, 40, 64)
    assert [row["step"] for row in curve] == [25, 40]
    assert [row["tokens"] for row in curve] == [1600, 2560]
    assert curve[0]["loss"] == pytest.approx(curve[0]["fvu"], rel=0.1)
    assert curve[1]["l0"] <= 2


SLOW = {"lr": 3e-3}


def test_auxk_brings_dead_features_back():
    rows, _ = planted(4096, d_in=16, n_features=24, n_active=3)

    def dead_after(coefficient):
        spec = spec_of("topk", 16, 3, 64)
        group = make_group(rows, [spec], 400, 128, dead_features={"auxk_coefficient": coefficient}, optimisation=SLOW)
        group.trainers[spec.name].params.b_enc[:48] = -3.0
        return train(group, rows, 400, 128)[-1]["dead_fraction"]

    without = dead_after(0.0)
    assert without > 0.4
    assert dead_after(1 / 32) < 0.85 * without


def test_resampling_brings_dead_features_back():
    rows, _ = planted(4096, d_in=16, n_features=24, n_active=3)

    def dead_after(**options):
        spec = spec_of("topk", 16, 3, 64)
        dead_features = {"auxk_coefficient": 0, **options}
        group = make_group(rows, [spec], 400, 128, dead_features=dead_features, optimisation=SLOW)
        group.trainers[spec.name].params.b_enc[:48] = -3.0
        return train(group, rows, 400, 128)[-1]["dead_fraction"]

    assert dead_after(resample_steps=60) < 0.85 * dead_after()


def test_a_loss_that_is_not_finite_stops_the_training_with_the_sae_named():
    rows, _ = planted(512, d_in=8, n_features=12, n_active=2)
    group = make_group(rows, [spec_of("topk", 8, 2, 24)], 10, 64, log_steps=5)
    rows[0] = torch.inf
    for step in range(4):
        group.step({HOOK: rows}, step)
    with pytest.raises(StageError, match=r"L0\.resid_post\.topk.*Lower the learning rate"):
        group.step({HOOK: rows}, 4)


def test_constant_activations_are_refused():
    with pytest.raises(StageError, match="do not vary"):
        Normaliser.from_moments(torch.ones(4), 0.0, HOOK)


def test_batchtopk_threshold_is_the_bias_corrected_running_mean():
    threshold = ThresholdMean(1000)
    assert threshold.value == 0
    mean = 0.0
    for step, smallest in enumerate([2.0, 4.0, 3.0], start=1):
        threshold.observe(torch.tensor(smallest))
        mean = 0.99 * mean + 0.01 * smallest
        assert float(threshold.value) == pytest.approx(mean / (1 - 0.99**step))
    threshold.observe(torch.tensor(torch.inf))
    assert float(threshold.value) > 2
