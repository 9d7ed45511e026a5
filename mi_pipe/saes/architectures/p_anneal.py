"""P-annealing: z = ReLU(pre) with a penalty Σ z^p whose p falls from 1 towards counting active features.

Karvonen et al., "Measuring progress in dictionary learning for language model interpretability with board game models",
2024, section 3. loss = (Σ‖x - x̂‖² + λ_p Σ ((z_j + δ)^p - δ^p)) / (batch * d_out) + AuxK with unit decoder rows. The
offset δ = 0.1 (activations are of order 1) keeps the slope finite where z is small, where z^p alone has none.

p is 1 for the first 30 % of the training and then falls to 0.2 in ten equal moves until 80 % of it. At each move λ is
multiplied by Σ f_p / Σ f_p' on the batch, so that the penalty weighs as much as before; where λ is led to a target L0,
by that to the power 0.75.
"""

from dataclasses import replace

import torch
from torch import Tensor

from mi_pipe.saes.architectures.coefficient import Sparsity
from mi_pipe.saes.architectures.relu_penalty import penalised_outcome
from mi_pipe.saes.architectures.standard import Penalised
from mi_pipe.saes.parameters import Parameters
from mi_pipe.saes.step import Batch, Outcome, StepContext

P_END = 0.2
_N_MOVES = 10
_FIRST, _LAST = 0.3, 0.8
_OFFSET = 0.1
_LED_SHARE = 0.75
"""A led coefficient gets this power of the ratio. Where λ keeps the penalty's whole weight, L0 falls with every move,
and a short training has no time to lead it back: it ended 22 % below its target after 244 steps on SmolLM2."""


def lp(z: Tensor, p: float) -> tuple[Tensor, Tensor]:
    """Return (z + δ)^p - δ^p and its slope for z ≥ 0."""
    return (z + _OFFSET).pow(p) - _OFFSET**p, p * (z + _OFFSET).pow(p - 1)


def p_at(step: int, n_steps: int, p_end: float = P_END) -> float:
    """Return p at a step.

    >>> [round(p_at(step, 100), 2) for step in (0, 29, 30, 50, 79, 99)]
    [1.0, 1.0, 0.92, 0.6, 0.2, 0.2]
    """
    done = (step / n_steps - _FIRST) / (_LAST - _FIRST)
    n_moves = min(_N_MOVES, int(done * _N_MOVES) + 1) if done >= 0 else 0
    return 1 - (1 - p_end) * n_moves / _N_MOVES


class _Power:
    """The penalty of a step, which before a move of p also sums what the next power would give."""

    def __init__(self, p: float, p_next: float) -> None:
        self._p = p
        self._p_next = p_next
        self._now = self._then = 0.0

    def __call__(self, z: Tensor) -> tuple[Tensor, Tensor]:
        values, slopes = lp(z, self._p)
        if self._p_next != self._p:
            self._now += float(values.sum())
            self._then += float(lp(z, self._p_next)[0].sum())
        return values, slopes

    @property
    def ratio(self) -> float:
        """How many times as much the penalty weighs as with the next power; 1 without a move."""
        return self._now / self._then if self._then else 1.0


class PAnneal(Penalised):
    """ReLU and a falling power."""

    def __init__(self, sparsity: Sparsity, p_end: float = P_END) -> None:
        """End at power `p_end`."""
        super().__init__(sparsity)
        self._p_end = p_end

    def outcome(self, params: Parameters, batch: Batch, context: StepContext) -> Outcome:
        """Return losses and gradients of a batch."""
        power = _Power(*(p_at(step, context.n_steps, self._p_end) for step in (context.step, context.step + 1)))
        coefficient = self.coefficient.at(context.step)
        outcome = penalised_outcome(params, batch, context, coefficient, power)
        return replace(outcome, noted={"ratio": torch.tensor(power.ratio, dtype=torch.float64)})

    def observe(self, outcome: Outcome, n_rows: int) -> None:
        """Let the coefficient follow the target, and the power."""
        super().observe(outcome, n_rows)
        share = _LED_SHARE if self.coefficient.is_led else 1.0
        self.coefficient.rescale(float(outcome.noted["ratio"]) ** share)
