"""From a sweep's options to trainers: the architecture by name, its parameters, its settings."""

import torch

from mi_pipe.saes.architectures.base import Architecture
from mi_pipe.saes.architectures.batchtopk import BatchTopK
from mi_pipe.saes.architectures.coefficient import Sparsity
from mi_pipe.saes.architectures.gated import Gated
from mi_pipe.saes.architectures.jumprelu import JumpReLU
from mi_pipe.saes.architectures.k_schedule import KSchedule
from mi_pipe.saes.architectures.matryoshka import Matryoshka
from mi_pipe.saes.architectures.p_anneal import PAnneal
from mi_pipe.saes.architectures.standard import Standard
from mi_pipe.saes.architectures.topk import TopK
from mi_pipe.saes.auxk import dead_window
from mi_pipe.saes.config import TrainSAEsConfig
from mi_pipe.saes.kernels import Precision
from mi_pipe.saes.optimisation import Schedule, default_lr
from mi_pipe.saes.parameters import Parameters, initial_parameters
from mi_pipe.saes.step import Scratch
from mi_pipe.saes.sweep import SAESpec
from mi_pipe.saes.trainer import SAETrainer, TrainerSettings


def build_trainer(
    config: TrainSAEsConfig, spec: SAESpec, precision: Precision, device: torch.device, scratch: Scratch | None = None
) -> SAETrainer:
    """Return a trainer at its start."""
    architecture = build_architecture(config, spec)
    params = build_parameters(config, spec).to(device)
    return SAETrainer(params, architecture, trainer_settings(config, spec, precision), scratch)


def build_architecture(config: TrainSAEsConfig, spec: SAESpec) -> Architecture:
    """Return the architecture that a spec names."""
    k = KSchedule(spec.k, config.sparsity.k_start, config.sparsity.k_fraction)
    sparsity = Sparsity(
        target_l0=spec.k if spec.coefficient is None else None,
        coefficient=spec.coefficient,
        warmup_steps=int(config.sparsity.warmup_fraction * config.n_steps),
    )
    match spec.architecture:
        case "topk":
            return TopK(k)
        case "batchtopk":
            return BatchTopK(k, config.n_steps)
        case "matryoshka":
            return Matryoshka(k, config.n_steps, config.matryoshka_fractions)
        case "standard":
            return Standard(sparsity, spec.sites.output_widths)
        case "p_anneal":
            return PAnneal(sparsity, config.p_end)
        case "gated":
            return Gated(sparsity)
        case "jumprelu":
            return JumpReLU(sparsity, config.jumprelu.loss, config.jumprelu.bandwidth)


def build_parameters(config: TrainSAEsConfig, spec: SAESpec) -> Parameters:
    """Return the initial parameters of a spec, on the CPU."""
    sites = spec.sites
    is_transcoder = sites.kind == "transcoder"
    params = initial_parameters(
        sum(sites.input_widths),
        spec.d_sae,
        spec.seed,
        d_out=sum(sites.output_widths) if is_transcoder else None,
        skip=config.skip and is_transcoder,
    )
    if spec.architecture == "jumprelu":
        params.threshold = torch.zeros(spec.d_sae)
    if spec.architecture == "gated":
        params.r_mag, params.b_mag = torch.zeros(spec.d_sae), torch.zeros(spec.d_sae)
    return params


def trainer_settings(config: TrainSAEsConfig, spec: SAESpec, precision: Precision) -> TrainerSettings:
    """Return the settings of a spec's trainer."""
    rates, dead = config.optimisation, config.dead_features
    schedule = Schedule.of_budget(
        peak=spec.lr or _only_rate(config) or default_lr(spec.d_sae, config.n_steps),
        n_steps=config.n_steps,
        warmup_steps=rates.warmup_steps,
        warmup_fraction=rates.warmup_fraction,
        decay_fraction=rates.decay_fraction,
    )
    return TrainerSettings(
        schedule=schedule,
        dead_window=dead_window(config.n_tokens, dead.window_tokens),
        clip_norm=rates.clip_norm,
        auxk_coefficient=dead.auxk_coefficient,
        encoder_precision=precision,
        average_decay=rates.average_decay,
        resample_steps=dead.resample_steps,
        threshold_lr=config.jumprelu.threshold_lr,
        seed=spec.seed,
    )


def _only_rate(config: TrainSAEsConfig) -> float | None:
    """Return the learning rate if there is but one: it is then not part of the names."""
    lr = config.optimisation.lr
    if isinstance(lr, list):
        return lr[0] if len(lr) == 1 else None
    return lr
