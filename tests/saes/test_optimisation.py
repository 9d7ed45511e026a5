import math

import pytest
import torch

from mi_pipe.saes.optimisation import Optimiser, Schedule, default_lr
from mi_pipe.saes.parameters import Parameters


def make(d_sae=6, d_in=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    W_dec = torch.nn.functional.normalize(torch.randn(d_sae, d_in, generator=generator), dim=1)
    params = Parameters(W_dec.clone(), W_dec, torch.zeros(d_sae), torch.zeros(d_in))
    shapes = {name: value.shape for name, value in params.named().items()}
    grads = Parameters(**{name: torch.randn(shape, generator=generator) for name, shape in shapes.items()})
    return params, grads


def test_learning_rate_follows_the_width_and_the_length():
    assert default_lr(2**14, 2**13) == default_lr(2**14, 10**6) == 2e-4
    assert default_lr(2**12, 10**6) == 4e-4
    assert default_lr(2**14, 2**9) == 8e-4
    assert default_lr(2**14, 1) == 5e-3


def test_learning_rate_rises_stays_and_falls_to_zero():
    schedule = Schedule.of_budget(1.0, n_steps=100, warmup_steps=1000, warmup_fraction=0.05, decay_fraction=0.2)
    rates = [schedule.lr(step) for step in range(100)]
    assert rates[:6] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])
    assert rates[80:82] == pytest.approx([1.0, 0.95])
    assert rates[-1] == pytest.approx(0.05)


def test_warm_up_is_a_thousand_steps_in_long_runs():
    assert Schedule.of_budget(1.0, 10**6, 1000, 0.05, 0.2).warmup_steps == 1000


def test_decoder_rows_keep_norm_one():
    params, grads = make()
    Optimiser(params, Schedule(0.1, 10, 0, 0), clip_norm=1.0).step(grads, 0)
    torch.testing.assert_close(params.W_dec.norm(dim=1), torch.ones(6))


def test_a_gradient_along_the_decoder_rows_leaves_no_moment():
    params, _ = make()
    grads = Parameters(*(torch.zeros_like(value) for value in params.named().values()))
    grads.W_dec = 3 * params.W_dec.clone()
    optimiser = Optimiser(params, Schedule(0.1, 10, 0, 0), clip_norm=1e9)
    optimiser.step(grads, 0)
    assert optimiser.state()["W_dec.exp_avg"].abs().max() < 1e-6


def test_clipping_scales_all_gradients_by_one_factor():
    params, grads = make()
    optimiser = Optimiser(params, Schedule(1e-3, 10, 0, 0), clip_norm=0.5)
    norm, _ = optimiser.step(grads, 0)
    assert norm > 0.5
    first_moments = [value for name, value in optimiser.state().items() if name.endswith("exp_avg")]
    total = math.sqrt(sum(float(value.square().sum()) for value in first_moments))
    assert total == pytest.approx(0.1 * 0.5, rel=1e-4)


def test_update_equals_plain_adam():
    params, grads = make()
    expected = [value.clone().requires_grad_() for value in (params.W_enc, params.b_enc, params.b_dec)]
    adam = torch.optim.Adam(expected, lr=1e-2, foreach=False)
    optimiser = Optimiser(params, Schedule(1e-2, 10, 0, 0), clip_norm=1e9)
    for step in range(3):
        for value, grad in zip(expected, (grads.W_enc, grads.b_enc, grads.b_dec), strict=True):
            value.grad = grad.clone()
        adam.step()
        optimiser.step(Parameters(*(grad.clone() for grad in grads.named().values())), step)
    torch.testing.assert_close(params.W_enc, expected[0].detach())
    torch.testing.assert_close(params.b_enc, expected[1].detach())
    torch.testing.assert_close(params.b_dec, expected[2].detach())
