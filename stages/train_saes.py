"""train_saes: train sparse autoencoders on stored activations, a sweep with one pass over the data a hook point.

Steps: for each hook point train its SAEs together, with checkpoints between, and save them on raw activations;
then evaluate each on held-out rows and, spliced into the model, on held-out prompts. The mathematics is in
`mi_pipe.saes`.
"""

import itertools
import json
import logging
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mi_pipe.activations.prompt_agreement import check_prompts
from mi_pipe.activations.store import ActivationStore
from mi_pipe.activations.training.shuffled import ShuffledReader
from mi_pipe.core import atomic
from mi_pipe.core.errors import HookPointError, near_names
from mi_pipe.core.manifest import Scalar
from mi_pipe.core.stage import Estimate, Stage
from mi_pipe.core.workspace import Workspace
from mi_pipe.models.device import pick_device
from mi_pipe.models.source import ModelSource, load_source
from mi_pipe.prompts.prompt_set import PromptSet
from mi_pipe.saes.checkpoint import Checkpoint, drop_checkpoint, load_checkpoint, save_checkpoint
from mi_pipe.saes.config import TrainSAEsConfig
from mi_pipe.saes.held_out import HeldOut, InModel
from mi_pipe.saes.kernels import Precision, pick_precision
from mi_pipe.saes.normalisation import Normaliser
from mi_pipe.saes.sae import SAE
from mi_pipe.saes.sae_set import CONFIG_FILE, EVALUATION_FILE, PROBE_FILE, TRAINING_FILE, WEIGHTS_FILE
from mi_pipe.saes.storage import make_probe, read_sae, sae_config, sae_tensors
from mi_pipe.saes.sweep import SAESpec, grid, short_hook
from mi_pipe.saes.trainer import SAETrainer, Scratch, initial_parameters
from mi_pipe.saes.training import CURVE_COLUMNS, TrainingGroup

logger = logging.getLogger(__name__)

_PROBE_ROWS = 16
_UNITS_A_HOOK = 50
_FLOAT_BYTES = 4
_COPIES_IN_CHECKPOINT = 3
_EVALUATION_COLUMNS = [
    *("sae", "fvu", "l0", "dead_fraction", "silent_fraction", "cosine", "n_rows"),
    *("ce_clean", "ce_sae", "ce_zero", "ce_recovered", "n_prompts"),
]


@dataclass(frozen=True)
class Inputs:
    """What SAEs are trained on, and the model and prompts to evaluate them in, where both are known."""

    model: ModelSource | None
    prompts: PromptSet | None
    activations: ActivationStore


def estimate(config: TrainSAEsConfig, inputs: Inputs) -> Estimate:
    """Return the bytes of all weights and of two checkpoints of the largest hook point (both exist for a moment)."""
    specs = plan_sweep(config, inputs.activations)
    weights: dict[str, int] = {}
    for spec in specs:
        width = inputs.activations.width(spec.hook)
        weights[spec.hook] = weights.get(spec.hook, 0) + _FLOAT_BYTES * (2 * spec.d_sae * width + spec.d_sae + width)
    size = sum(weights.values()) + 2 * _COPIES_IN_CHECKPOINT * max(weights.values())
    note = f"{len(specs)} SAEs, {config.n_steps * config.batch_rows:,} tokens each"
    return Estimate(size, config.n_steps * len(weights), "steps", (note,))


def plan_sweep(config: TrainSAEsConfig, store: ActivationStore) -> list[SAESpec]:
    """Return the SAEs to train, hook by hook; raises HookPointError for hook points that the store does not hold."""
    for hook in config.hooks or []:
        if hook not in store.hooks:
            near = near_names(hook, store.hooks)
            raise HookPointError(
                f"saes.hooks: {store.id} holds no activations of {hook!r}.{near} It holds {', '.join(store.hooks)}."
            )
    hooks = config.hooks or store.hooks
    return grid(hooks, _listed(config.architecture), _listed(config.k), _listed(config.d_sae), config.seeds)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def run(config: TrainSAEsConfig, inputs: Inputs, work: Workspace) -> dict[str, Scalar]:
    """Train, save and evaluate the sweep; return the range of the main figures over the SAEs."""
    specs = plan_sweep(config, inputs.activations)
    by_hook = {hook: list(group) for hook, group in itertools.groupby(specs, key=lambda spec: spec.hook)}
    device = pick_device(config.device)
    held_out = _held_out(config, inputs, device)
    trainings = [_HookTraining(config, inputs, work, held_out, group) for group in by_hook.values()]
    work.ledger.expect(len(trainings) * (_n_units(config) + 1) + len(specs))
    curves = [row for training in trainings for row in training.finish()]
    work.write_table(TRAINING_FILE, pd.DataFrame(curves, columns=list(CURVE_COLUMNS)))
    probes = {spec.name: load_file(_probe_path(work, spec)) for spec in specs}
    work.write_tensors(
        PROBE_FILE, {f"{n}.{part}": value for n, probe in probes.items() for part, value in probe.items()}
    )
    dead = {row["sae"]: row["dead_fraction"] for row in curves}
    rows = [{**_evaluate(spec, work, held_out, device), "dead_fraction": dead[spec.name]} for spec in specs]
    work.write_table(EVALUATION_FILE, pd.DataFrame(rows, columns=_EVALUATION_COLUMNS))
    return _summary(rows)


def _held_out(config: TrainSAEsConfig, inputs: Inputs, device: torch.device) -> HeldOut:
    """Return the held-out side; raises ConfigError if the rows are no tokens of the prompts."""
    model, prompts = inputs.model, inputs.prompts
    if prompts is not None:
        check_prompts(inputs.activations, prompts)
    if model is None or prompts is None:
        missing = " and ".join(name for name, value in (("model", model), ("prompts", prompts)) if value is None)
        logger.warning(
            "%s: no %s: cross-entropy with the SAEs in the model is not measured", inputs.activations.id, missing
        )
        return HeldOut(inputs.activations, config, None)
    return HeldOut(inputs.activations, config, InModel(prompts, lambda: load_source(model, str(device))))


def _evaluate(spec: SAESpec, work: Workspace, held_out: HeldOut, device: torch.device) -> dict[str, Any]:
    unit = f"evaluate {spec.name}"
    if unit not in work.ledger:
        work.progress.update(0, 1, "evaluation", spec.name)
        folder = work.folder / "saes" / spec.name
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        sae = read_sae(config, load_file(folder / WEIGHTS_FILE)).to(device)
        work.ledger.mark(unit, **held_out.evaluate(sae))
    return {"sae": spec.name, **work.ledger.info(unit)}


def _summary(rows: list[dict[str, Any]]) -> dict[str, Scalar]:
    summary: dict[str, Scalar] = {"n_saes": len(rows)}
    for name in ("fvu", "l0", "ce_recovered"):
        values: list[float] = [row[name] for row in rows if not math.isnan(row[name])]
        if values:
            summary |= {f"{name}_min": min(values), f"{name}_max": max(values)}
    return {**summary, "dead_fraction_max": max(row["dead_fraction"] for row in rows)}


def _n_units(config: TrainSAEsConfig) -> int:
    """Return in how many units the ledger counts the training of one hook point."""
    return min(config.n_steps, _UNITS_A_HOOK)


class _HookTraining:
    """The training of one hook point's SAEs, from the last checkpoint to files."""

    def __init__(
        self, config: TrainSAEsConfig, inputs: Inputs, work: Workspace, held_out: HeldOut, specs: list[SAESpec]
    ) -> None:
        self._config = config
        self._store = inputs.activations
        self._work = work
        self._held_out = held_out
        self._specs = specs
        self._hook = specs[0].hook
        self._folder = work.scratch / "checkpoints" / short_hook(self._hook)
        data = config.data
        self._reader = ShuffledReader(
            self._store,
            [self._hook],
            batch_rows=config.batch_rows,
            seed=data.shuffle_seed,
            pool_rows=data.pool_rows,
            held_out_fraction=data.held_out_fraction,
            split_seed=data.split_seed,
        )

    def finish(self) -> list[dict[str, Any]]:
        """Do what is left to do; return the training curve."""
        saved, curve_path = f"save {self._hook}", self._folder / "curve.json"
        if saved not in self._work.ledger:
            device = pick_device(self._config.device)
            precision = self._config.encoder_precision
            precision = pick_precision(device) if precision == "auto" else precision
            group = self._group(device, precision)
            curve = self._train(group)
            for spec, sae in zip(self._specs, group.folded().values(), strict=True):
                self._save(spec, sae, precision)
            atomic.write_json(curve_path, curve)
            self._mark(self._config.n_steps)
            self._work.ledger.mark(saved)
            drop_checkpoint(self._folder)
        return json.loads(curve_path.read_text(encoding="utf-8"))

    def _group(self, device: torch.device, precision: Precision) -> TrainingGroup:
        statistics = self._store.statistics(self._hook)
        normaliser = Normaliser.from_moments(
            torch.from_numpy(statistics.mean), statistics.mean_square_norm_centred, self._hook
        )
        logger.info(
            "%s: the mean's norm is %.2f of the deviation's; %d massive rows are left out",
            *(self._hook, normaliser.outlier_ratio, statistics.n_massive),
        )
        scratch = Scratch()
        trainers: dict[str, SAETrainer] = {}
        for spec in self._specs:
            params = initial_parameters(self._store.width(self._hook), spec.d_sae, spec.seed).to(device)
            settings = self._config.trainer_settings(spec.d_sae, precision)
            trainers[spec.name] = SAETrainer(params, spec.build(self._config.n_steps), settings, scratch)
        return TrainingGroup(normaliser, trainers)

    def _train(self, group: TrainingGroup) -> list[dict[str, Any]]:
        first, curve = self._resume(group)
        n_steps, saved_at = self._config.n_steps, time.monotonic()
        for interval in group.train(self._batches(first), first, n_steps, self._config.log_steps):
            curve += interval.rows
            self._report(interval.rows)
            if time.monotonic() - saved_at >= self._config.checkpoint_s and interval.n_steps_done < n_steps:
                save_checkpoint(self._folder, Checkpoint(interval.n_steps_done, group.state(), curve))
                self._mark(interval.n_steps_done)
                saved_at = time.monotonic()
        return curve

    def _resume(self, group: TrainingGroup) -> tuple[int, list[dict[str, Any]]]:
        found = load_checkpoint(self._folder)
        if found is None:
            return 0, []
        group.load_state(found.tensors)
        logger.info("%s: going on at step %d", self._hook, found.step)
        return found.step, found.rows

    def _batches(self, first_step: int) -> Iterator[Tensor]:
        n_left = self._config.n_steps - first_step
        device = pick_device(self._config.device)
        return (batch[self._hook] for batch in self._reader.batches(first_step, n_left, device=device))

    def _report(self, rows: list[dict[str, Any]]) -> None:
        total = self._config.n_steps * self._config.batch_rows
        fvu = ", ".join(f"{row['fvu']:.3f}" for row in rows)
        self._work.progress.update(rows[0]["tokens"], total, "tokens", f"{short_hook(self._hook)} FVU {fvu}")

    def _mark(self, n_steps_done: int) -> None:
        """Mark the units of training that are durable."""
        n_units = _n_units(self._config)
        for i in range(n_steps_done * n_units // self._config.n_steps):
            unit = f"train {self._hook} {i + 1}/{n_units}"
            if unit not in self._work.ledger:
                self._work.ledger.mark(unit)

    def _save(self, spec: SAESpec, sae: SAE, precision: Precision) -> None:
        sae.hook, sae.architecture, sae.name = spec.hook, spec.architecture, spec.name
        probe = make_probe(sae, self._held_out.sample(self._hook, _PROBE_ROWS))
        with atomic.atomic_path(_probe_path(self._work, spec)) as temp:
            save_file(probe, temp)
        folder = f"saes/{spec.name}"
        self._work.write_tensors(f"{folder}/{WEIGHTS_FILE}", sae_tensors(sae))
        self._work.write_json(f"{folder}/{CONFIG_FILE}", sae_config(sae, spec.seed, probe, precision))


def _probe_path(work: Workspace, spec: SAESpec) -> Path:
    """Return where an SAE's probe lies until those of all SAEs are gathered in one file."""
    return work.scratch / "probes" / f"{spec.name}.safetensors"


STAGE = Stage(name="train_saes", version=1, config=TrainSAEsConfig, inputs=Inputs, run=run, estimate=estimate)
