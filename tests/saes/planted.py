"""Activations with a known dictionary, and trainers for it."""

import torch

from mi_pipe.saes.normalisation import Normaliser
from mi_pipe.saes.optimisation import Schedule, default_lr
from mi_pipe.saes.sweep import SAESpec
from mi_pipe.saes.trainer import SAETrainer, Scratch, TrainerSettings, initial_parameters
from mi_pipe.saes.training import TrainingGroup


def planted(n_rows: int, d_in: int, n_features: int, n_active: int, seed: int = 0):
    """Rows that are sums of `n_active` of `n_features` random unit directions, about a mean far from 0."""
    generator = torch.Generator().manual_seed(seed)
    dictionary = torch.nn.functional.normalize(torch.randn(n_features, d_in, generator=generator), dim=1)
    chosen = torch.rand(n_rows, n_features, generator=generator).argsort(1)[:, :n_active]
    strengths = 1 + torch.rand(n_rows, n_active, generator=generator)
    rows = torch.einsum("rk,rkd->rd", strengths, dictionary[chosen])
    mean = 5 * torch.randn(d_in, generator=generator)
    return 3 * rows + mean, dictionary


def batch(rows: torch.Tensor, step: int, batch_rows: int) -> torch.Tensor:
    """Batch `step`, a function of the step alone."""
    generator = torch.Generator().manual_seed(1000 + step)
    return rows[torch.randint(0, len(rows), (batch_rows,), generator=generator)]


def make_group(
    rows: torch.Tensor, specs: list[SAESpec], n_steps: int, batch_rows: int, lr: float | None = None, **settings
) -> TrainingGroup:
    mean = rows.double().mean(0)
    normaliser = Normaliser.from_moments(mean, float((rows - mean).square().sum(1).mean()))
    scratch = Scratch()
    trainers = {}
    for spec in specs:
        schedule = Schedule.of_budget(lr or default_lr(spec.d_sae), n_steps, 1000, 0.05, 0.2)
        window = max(1, n_steps * batch_rows // 10)
        trainers[spec.name] = SAETrainer(
            initial_parameters(rows.shape[1], spec.d_sae, spec.seed),
            spec.build(n_steps),
            TrainerSettings(schedule, window, **settings),
            scratch,
        )
    return TrainingGroup(normaliser, trainers)


def train(group: TrainingGroup, rows: torch.Tensor, n_steps: int, batch_rows: int, first_step: int = 0, log_steps=50):
    batches = (batch(rows, step, batch_rows) for step in range(first_step, n_steps))
    return [row for interval in group.train(batches, first_step, n_steps, log_steps) for row in interval.rows]
