import math

import numpy as np
import pytest
import torch
import xarray as xr

from mi_pipe.core.errors import ConfigError, StageError
from mi_pipe.patching.metrics import (
    METRIC_NAMES,
    NO_TOKEN,
    PairInfo,
    effect_fraction,
    find_metric,
    logit_diff,
    lost_fraction,
    metric_of_logits,
    metric_source,
    recovered_fraction,
)


def test_logit_diff_of_a_worked_example():
    logits = torch.tensor([[1.0, 2.5, -1.0], [0.0, 4.0, 3.0]])
    found = logit_diff(logits, torch.tensor([1, 2]), torch.tensor([0, 1]))
    assert found.tolist() == [1.5, -1.0]


def test_fractions_of_a_worked_example():
    # Five patched values between corrupted -1 and clean 3, and beyond on either side.
    patched = np.array([-1.0, 0.0, 1.0, 3.0, 5.0])
    assert recovered_fraction(patched, np.array(3.0), np.array(-1.0)).tolist() == [0.0, 0.25, 0.5, 1.0, 1.5]
    assert lost_fraction(patched, np.array(3.0), np.array(-1.0)).tolist() == [1.0, 0.75, 0.5, 0.0, -0.5]


def test_recovered_and_lost_add_up_to_one():
    assert math.isclose(recovered_fraction(0.3, 2.0, -1.0) + lost_fraction(0.3, 2.0, -1.0), 1.0)


def test_effect_fraction_follows_the_direction():
    assert effect_fraction(0.0, 3.0, -1.0, "denoising") == 0.25
    assert effect_fraction(0.0, 3.0, -1.0, "noising") == 0.75


def test_there_is_no_fraction_between_runs_that_do_not_differ():
    patched, clean, corrupted = np.array([1.0, 0.5, 0.5]), np.array([0.5, 0.5, 3e6]), np.array([0.5, 0.5, 3e6 + 1.0])
    for found in (recovered_fraction(patched, clean, corrupted), lost_fraction(patched, clean, corrupted)):
        assert np.isnan(found).all(), "neither infinite nor any number"
    assert math.isnan(recovered_fraction(1.0, 0.5, 0.5))
    of_array = effect_fraction(xr.DataArray(patched, dims="x"), xr.DataArray(0.0), xr.DataArray(0.0), "noising")
    assert of_array.dims == ("x",)
    assert bool(of_array.isnull().all())


LOGITS = torch.tensor([[1.0, 2.5, -1.0, 0.0], [0.0, 4.0, 3.0, 1.0]], dtype=torch.float64)
PAIRS = PairInfo(torch.tensor([[1, NO_TOKEN], [2, 3]]), torch.tensor([[0, 2], [1, NO_TOKEN]]), LOGITS.flip(0))


def test_metrics_of_token_sets_of_a_worked_example():
    p = np.exp(LOGITS.numpy()) / np.exp(LOGITS.numpy()).sum(1, keepdims=True)
    right, wrong = np.array([p[0, 1], p[1, 2] + p[1, 3]]), np.array([p[0, 0] + p[0, 2], p[1, 1]])
    wanted = {
        "logit_diff": np.array([2.5 - (1.0 - 1.0) / 2, (3.0 + 1.0) / 2 - 4.0]),
        "probability": right,
        "prob_diff": right - wrong,
        "loss": -np.log(right),
        "kl": (p[::-1] * np.log(p[::-1] / p)).sum(1),
    }
    assert set(wanted) == set(METRIC_NAMES)
    for name, values in wanted.items():
        found = metric_of_logits(find_metric(name), LOGITS, PAIRS)
        np.testing.assert_allclose(found.numpy(), values, rtol=1e-12, err_msg=name)


def test_metrics_are_differentiable_with_finite_gradients():
    for name in METRIC_NAMES:
        logits = LOGITS.clone().requires_grad_()
        assert torch.autograd.gradcheck(lambda value, n=name: metric_of_logits(find_metric(n), value, PAIRS), logits)


def first_logit(logits, pairs):
    return logits[:, 0] * len(pairs.answers)


def test_a_function_of_the_users_own_is_found_by_its_import_path():
    metric = find_metric(f"{__name__}:first_logit")
    assert metric.needs_all_logits
    assert metric_of_logits(metric, LOGITS, PAIRS).tolist() == [2.0, 0.0]
    assert metric_source(metric.name)
    assert metric_source("kl") is None


def mean_logit(logits, pairs):
    return logits.mean()


def is_right(logits, pairs):
    return logits.argmax(-1) == pairs.answers[:, 0]


def of_a_third_answer(logits, pairs):
    return logits.gather(-1, pairs.answers[:, 2:3])[:, 0] / len(pairs.answers[0, 7])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mean_logit", r"mean_logit returned \(\) for logits \(2, 4\); it must return .* \(2,\)"),
        ("of_a_third_answer", r"of_a_third_answer raised IndexError: .*test_metrics\.py, line \d+\)"),
    ],
)
def test_a_function_that_fails_or_gives_another_number_of_values_is_told_in_one_sentence(name, message):
    with pytest.raises(StageError, match=message) as found:
        metric_of_logits(find_metric(f"{__name__}:{name}"), LOGITS, PAIRS)
    assert str(found.value).count("\n") == 0


def test_a_function_may_return_booleans():
    found = metric_of_logits(find_metric(f"{__name__}:is_right"), LOGITS, PAIRS)
    assert found.dtype == torch.float32
    assert found.tolist() == [1.0, 0.0]


def test_unknown_metrics_are_answered_in_one_sentence():
    with pytest.raises(ConfigError, match=r"no metric 'logit_dif'\. Did you mean 'logit_diff'"):
        find_metric("logit_dif")
    with pytest.raises(ConfigError, match="cannot be imported"):
        find_metric("no_such_module:metric")
    with pytest.raises(ConfigError, match="not a function"):
        find_metric("math:pi")
