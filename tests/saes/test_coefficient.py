"""Weights of sparsity penalties: fixed ones, ones led to a target, and what annealing p does to both."""

import math

import pytest
import torch

from mi_pipe.saes.architectures.coefficient import Coefficient, Sparsity
from mi_pipe.saes.architectures.p_anneal import PAnneal, p_at
from mi_pipe.saes.step import Batch, StepContext
from tests.saes.test_gradients import random_parameters

N_STEPS, MOVE = 100, 30


def test_a_fixed_coefficient_rises_over_the_warm_up_and_stays_whatever_l0_is():
    fixed = Coefficient(Sparsity(coefficient=0.8, warmup_steps=4), start=5.0)
    assert [fixed.at(step) for step in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8])
    fixed.observe(1000.0)
    fixed.begin(3.0)
    assert fixed.at(10) == 0.8


@pytest.mark.parametrize("target", [2.0, 32.0])
def test_a_led_coefficient_brings_a_late_answering_l0_to_its_target(target):
    led, l0 = Coefficient(Sparsity(target_l0=target), start=0.01), 500.0
    for step in range(1500):
        wanted = 10 / led.at(step)
        l0 = math.exp(0.95 * math.log(l0) + 0.05 * math.log(wanted))
        before = led.at(step)
        led.observe(l0)
        assert abs(math.log(led.at(step) / before)) <= 0.02 + 1e-12
    assert l0 == pytest.approx(target, rel=0.02)


def moved(sparsity: Sparsity) -> tuple[float, float]:
    """By what the coefficient is multiplied at p's first move, and Σ f_p / Σ f_p' of the batch, written out."""
    generator = torch.Generator().manual_seed(0)
    params = random_parameters(6, 20, generator)
    x = torch.randn(50, 6, generator=generator, dtype=torch.float64)
    architecture = PAnneal(sparsity)
    context = StepContext(MOVE - 1, N_STEPS, torch.zeros(0, dtype=torch.int64))
    outcome = architecture.outcome(params, Batch(x, x), context)
    before = architecture.coefficient.at(0)
    architecture.observe(outcome, len(x))
    z = ((x - params.b_dec) @ params.W_enc.T + params.b_enc).relu()
    p, p_next = p_at(MOVE - 1, N_STEPS), p_at(MOVE, N_STEPS)
    sums = [float(((z + 0.1) ** power - 0.1**power).sum()) for power in (p, p_next)]
    assert p == 1 > p_next
    return architecture.coefficient.at(0) / before, sums[0] / sums[1]


def test_where_p_moves_a_fixed_penalty_keeps_its_weight_and_a_led_one_changes_less():
    found, ratio = moved(Sparsity(coefficient=0.7))
    assert found == pytest.approx(ratio, rel=1e-9)
    assert ratio != pytest.approx(1, rel=0.01)
    # The target is what L0 is, so that only the move changes the coefficient.
    generator = torch.Generator().manual_seed(0)
    params = random_parameters(6, 20, generator)
    x = torch.randn(50, 6, generator=generator, dtype=torch.float64)
    l0 = float((((x - params.b_dec) @ params.W_enc.T + params.b_enc) > 0).double().sum(1).mean())
    assert moved(Sparsity(target_l0=l0))[0] == pytest.approx(ratio**0.75, rel=1e-9)
