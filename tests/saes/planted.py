"""Activations with a known dictionary, and trainers for it."""

import torch

from mi_pipe.saes.building import build_trainer
from mi_pipe.saes.config import TrainSAEsConfig
from mi_pipe.saes.normalisation import Normaliser
from mi_pipe.saes.sites import Sites
from mi_pipe.saes.step import Scratch
from mi_pipe.saes.sweep import SAESpec
from mi_pipe.saes.training import TrainingGroup

HOOK = "blocks.0.hook_resid_post"


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


def spec_of(architecture: str, d_in: int, k: int, d_sae: int, seed: int = 0, **fields) -> SAESpec:
    return SAESpec(Sites.of_sae(HOOK, d_in), architecture, k, d_sae, seed, **fields)


def normaliser_of(rows: torch.Tensor) -> Normaliser:
    mean = rows.double().mean(0)
    return Normaliser.from_moments(mean, float((rows - mean).square().sum(1).mean()))


def make_group(
    rows: torch.Tensor | dict[str, torch.Tensor],
    specs: list[SAESpec],
    n_steps: int,
    batch_rows: int,
    lr: float | None = None,
    log_steps: int = 50,
    **options,
) -> TrainingGroup:
    """A group of trainers as the stage makes it; `options` are those of the stage's config."""
    by_hook = {HOOK: rows} if isinstance(rows, torch.Tensor) else rows
    rates = {"lr": lr, **options.pop("optimisation", {})}
    config = TrainSAEsConfig(n_tokens=n_steps * batch_rows, batch_rows=batch_rows, optimisation=rates, **options)
    scratch, device = Scratch(), torch.device("cpu")
    trainers = {spec.name: build_trainer(config, spec, "float32", device, scratch) for spec in specs}
    normalisers = {hook: normaliser_of(values) for hook, values in by_hook.items()}
    return TrainingGroup(specs[0].sites, normalisers, trainers, log_steps)


def train(group: TrainingGroup, rows, n_steps: int, batch_rows: int, first_step: int = 0):
    """Train and return the curve."""
    by_hook = {HOOK: rows} if isinstance(rows, torch.Tensor) else rows
    curve = []
    for step in range(first_step, n_steps):
        curve += group.step({hook: batch(values, step, batch_rows) for hook, values in by_hook.items()}, step)
    return curve + group.rows(n_steps)
