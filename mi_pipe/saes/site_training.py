"""The training of some SAEs of the same hook points, from the last checkpoint to files.

What is written besides weights: rows of the training curve, rows of held-out metrics at a few moments of the training
with histograms of feature densities, and seconds (which differ from run to run and belong to no result).
"""

import json
import logging
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from mi_pipe.activations.training.shuffled import ShuffledReader
from mi_pipe.activations.training.source import RowSource
from mi_pipe.core import atomic
from mi_pipe.core.canonical import content_hash
from mi_pipe.core.errors import StageError
from mi_pipe.core.freed_memory import freed_memory_kept
from mi_pipe.core.interrupts import Held
from mi_pipe.models.device import pick_device
from mi_pipe.saes.building import build_trainer
from mi_pipe.saes.checkpoint import Checkpoint, drop_checkpoint, load_checkpoint, save_checkpoint
from mi_pipe.saes.config import TrainSAEsConfig
from mi_pipe.saes.held_out import HeldOut
from mi_pipe.saes.kernels import Precision, pick_precision
from mi_pipe.saes.normalisation import Normaliser
from mi_pipe.saes.planning import Start
from mi_pipe.saes.sae import SAE
from mi_pipe.saes.sae_set import CONFIG_FILE, STATE_FOLDER, WEIGHTS_FILE
from mi_pipe.saes.step import Scratch
from mi_pipe.saes.storage import make_probe, sae_config, sae_tensors
from mi_pipe.saes.sweep import SAESpec
from mi_pipe.saes.training import TrainingGroup
from mi_pipe.saes.training_clock import TrainingClock
from mi_pipe.saes.training_rows import Rows, density_histogram, finite, log_line

logger = logging.getLogger(__name__)

_PROBE_ROWS = 16


def _nothing(_told: object) -> None:
    """Hear of nothing."""


class SiteTraining:
    """SAEs that share a pass, as far as they have come."""

    def __init__(
        self,
        config: TrainSAEsConfig,
        source: RowSource,
        specs: list[SAESpec],
        folder: Path,
        scratch: Path,
        start: Start | None = None,
        model: str = "",
    ) -> None:
        """Train `specs` (all of the same sites) on `source`; weights go below `folder`, checkpoints below `scratch`.

        `model` is noted with the SAEs.
        """
        self.config = config
        self.specs = specs
        self.sites = specs[0].sites
        self.scratch = scratch / "sites" / f"{self.sites.short}-{content_hash([spec.name for spec in specs])[:8]}"
        self._source = source
        self._folder = folder
        self._start = start
        self._model = model
        data = config.data
        self._reader = ShuffledReader(
            source,
            self.sites.hooks,
            batch_rows=config.batch_rows,
            seed=data.shuffle_seed,
            pool_rows=data.pool_rows,
            held_out_fraction=data.held_out_fraction,
            split_seed=data.split_seed,
        )

    def finish(
        self,
        held_out: HeldOut,
        on_rows: Callable[[list[dict[str, Any]]], None] = _nothing,
        on_saved: Callable[[int], None] = _nothing,
    ) -> Rows:
        """Do what is left to do, and return the rows.

        `on_rows` hears of new rows of the curve, `on_saved` how many steps are durable.
        """
        path = self.scratch / "rows.json"
        if not path.exists():
            device = pick_device(self.config.device)
            precision = self.config.encoder_precision
            precision = pick_precision(device) if precision == "auto" else precision
            group = self._group(device, precision)
            rows = self._train(group, held_out, on_rows, on_saved)
            for name, sae in group.folded():
                self._save(name, sae, group, held_out, precision)
            atomic.write_json(path, vars(rows))
            drop_checkpoint(self.scratch)
        on_saved(self.config.n_steps)
        return Rows(**json.loads(path.read_text(encoding="utf-8")))

    def _group(self, device: torch.device, precision: Precision) -> TrainingGroup:
        scratch = Scratch()
        trainers = {spec.name: build_trainer(self.config, spec, precision, device, scratch) for spec in self.specs}
        normalisers = {hook: self._normaliser(hook) for hook in self.sites.hooks}
        return TrainingGroup(self.sites, normalisers, trainers, self.config.log_steps)

    def _normaliser(self, hook: str) -> Normaliser:
        found = self._source.statistics(hook)
        normaliser = Normaliser.from_moments(torch.from_numpy(found.mean), found.mean_square_norm_centred, hook)
        logger.info(
            "%s: the mean's norm is %.2f of the deviation's; %d massive rows are left out",
            *(hook, normaliser.outlier_ratio, found.n_massive),
        )
        return normaliser

    def _train(
        self,
        group: TrainingGroup,
        held_out: HeldOut,
        on_rows: Callable[[list[dict[str, Any]]], None],
        on_saved: Callable[[int], None],
    ) -> Rows:
        first, rows = self._resume(group)
        n_steps, moments = self.config.n_steps, self._evaluation_steps()
        clock = TrainingClock()
        batches = self._batches(first)
        with Held() as held, freed_memory_kept():
            for step in range(first, n_steps):
                new = group.step(clock.timed(batches), step)
                if step + 1 == n_steps:
                    new += group.rows(n_steps)
                if new:
                    rows.curve += new
                    rows.timing += [clock.row(step + 1, new[0]["tokens"], len(group.trainers), self.sites.label)]
                    on_rows(new)
                    if clock.is_log_due():
                        logger.info(log_line(self.sites.short, new, rows.timing[-1], n_steps))
                if step + 1 in moments:
                    self._look(group, held_out, step + 1, rows)
                due = clock.seconds_since_saved >= self.config.checkpoint_s or held.asked
                if due and step + 1 < n_steps:
                    save_checkpoint(self.scratch, Checkpoint(step + 1, group.state(), vars(rows)))
                    on_saved(step + 1)
                    clock.saved()
                if held.asked and step + 1 < n_steps:
                    batches.close()
                    break
        if held.was_asked:
            raise StageError(f"{self.sites.label}: the training was interrupted; the same command goes on from here.")
        return rows

    def _resume(self, group: TrainingGroup) -> tuple[int, Rows]:
        found = load_checkpoint(self.scratch)
        if found is not None:
            group.load_state(found.tensors)
            logger.info("%s: going on at step %d", self.sites.label, found.step)
            return found.step, Rows(**found.rows)
        if self._start is None:
            return 0, Rows()
        for name, trainer in group.trainers.items():
            trainer.load_state(self._start.state_of(name))
        return self._start.step, Rows()

    def _batches(self, first_step: int) -> Generator[dict[str, torch.Tensor]]:
        device = pick_device(self.config.device)
        return self._reader.batches(first_step, self.config.n_steps - first_step, device=device)

    def _evaluation_steps(self) -> set[int]:
        n, n_steps = self.config.evaluation.n_intervals, self.config.n_steps
        return {max(1, round((i + 1) * n_steps / n)) for i in range(n)}

    def _look(self, group: TrainingGroup, held_out: HeldOut, step: int, rows: Rows) -> None:
        """Add metrics of the SAEs as they are now on held-out rows."""
        asked = self.config.evaluation
        for name, sae in group.folded():
            sae.sites = self.sites
            sae = sae.to(group.device)
            found = held_out.evaluate_rows(sae, asked.interval_rows)
            figures = {**vars(found.figures), **held_out.evaluate_in_model(sae, asked.interval_prompts)}
            tokens = step * self.config.batch_rows
            rows.held_out.append({"sae": name, "step": step, "tokens": tokens, **finite(figures)})
            rows.densities += density_histogram(name, step, found)

    def _save(self, name: str, sae: SAE, group: TrainingGroup, held_out: HeldOut, precision: Precision) -> None:
        spec = next(spec for spec in self.specs if spec.name == name)
        sae.sites, sae.architecture, sae.name = self.sites, spec.architecture, spec.name
        sae.model = self._model
        probe = make_probe(sae, held_out.sample(self.sites, _PROBE_ROWS).x)
        self._write_tensors(self.scratch / "probes" / f"{name}.safetensors", probe)
        if self.config.keep_state:
            self._write_tensors(self._folder / STATE_FOLDER / f"{name}.safetensors", group.trainers[name].state())
        self._write_tensors(self._folder / "saes" / name / WEIGHTS_FILE, sae_tensors(sae))
        training = {"n_tokens": self.config.n_tokens, "lr": spec.lr, "coefficient": spec.coefficient}
        atomic.write_json(
            self._folder / "saes" / name / CONFIG_FILE, sae_config(sae, spec.seed, probe, precision, **training)
        )

    def _write_tensors(self, path: Path, tensors: dict[str, torch.Tensor]) -> None:
        with atomic.atomic_path(path) as temp:
            save_file({key: tensors[key].detach().cpu().contiguous() for key in sorted(tensors)}, temp)
