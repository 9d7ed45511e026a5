"""The part of the stage `lenses` that trains: from the last checkpoint in scratch to translators and their figures."""

from collections.abc import Iterator

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mi_pipe.activations.store import ActivationStore
from mi_pipe.core import atomic
from mi_pipe.core.manifest import Scalar
from mi_pipe.core.workspace import Workspace
from mi_pipe.lenses.config import TunedLensConfig
from mi_pipe.lenses.depths import hook_at
from mi_pipe.lenses.evaluation import evaluation_table, row_sums
from mi_pipe.lenses.final_layers import FinalLayers
from mi_pipe.lenses.final_residuals import FinalResiduals
from mi_pipe.lenses.lens_readings import EVALUATION_FILE, TRAINING_FILE, TRANSLATORS_FILE
from mi_pipe.lenses.main_figures import tuned_figures
from mi_pipe.lenses.translators import Translator
from mi_pipe.lenses.tuning import Tuning, Units
from mi_pipe.lenses.tuning_rows import RowBatch, TuningRows

_STATE = "tuning.safetensors"
_EVALUATION = "evaluation"


def n_units(config: TunedLensConfig | None) -> int:
    """Return the units of work of a training: its validations, and the evaluation."""
    return len(config.checkpoints()) + 1 if config else 0


def unit_done(work: Workspace, unit: str, note: str, **info: float) -> None:
    """Mark a unit of work in the ledger and say so."""
    work.ledger.mark(unit, **info)
    work.progress.update(work.ledger.n_done, work.ledger.n_total or 0, "units", note)


def tune(
    config: TunedLensConfig,
    hooks: dict[int, str],
    residuals: FinalResiduals,
    store: ActivationStore,
    final: FinalLayers,
    work: Workspace,
) -> dict[int, Translator]:
    """Train at `hooks`, by depth, evaluate on held-out rows, and return the translators on the model's device."""
    rows = TuningRows(store, hooks, residuals, config)
    tuning = Tuning(final, {depth: _units(store, hook) for depth, hook in hooks.items()}, config)
    state = work.scratch / _STATE
    if state.exists():
        tuning.load(load_file(state))
    _train(tuning, rows, config, final.device, work)
    translators = {depth: item.to(final.device) for depth, item in tuning.best().items()}
    if _EVALUATION not in work.ledger:
        _evaluate(translators, rows, config, final, work)
    return translators


def _units(store: ActivationStore, hook: str) -> Units:
    found = store.statistics(hook)
    return Units(torch.from_numpy(found.mean).float(), torch.from_numpy(found.variance).sqrt().float())


def _train(tuning: Tuning, rows: TuningRows, config: TunedLensConfig, device: torch.device, work: Workspace) -> None:
    checkpoints = config.checkpoints()
    n_validated = tuning.n_validated
    for step in checkpoints[:n_validated]:
        # A kill may come between a checkpoint and its line in the ledger.
        if _step_unit(step) not in work.ledger:
            unit_done(work, _step_unit(step), "tuned lens")
    if n_validated == len(checkpoints):
        return
    held = [rows.read(prompts, device) for prompts in rows.sample("validation", config.validation_rows)]
    if n_validated == 0:
        _validate(tuning, held, None, work)
    losses: list[list[float]] = []
    for i, prompts in enumerate(rows.training()):
        if i < tuning.step_no:
            continue
        losses.append(tuning.step(rows.read(prompts, device)))
        if tuning.step_no in checkpoints:
            _validate(tuning, held, np.mean(losses, axis=0).tolist(), work)
            losses = []


def _validate(tuning: Tuning, held: list[RowBatch], training: list[float] | None, work: Workspace) -> None:
    tuning.validate(held, training)
    with atomic.atomic_path(work.scratch / _STATE) as temp:
        save_file(tuning.state(), temp)
    unit_done(work, _step_unit(tuning.step_no), f"tuned lens, step {tuning.step_no}")


def _evaluate(
    translators: dict[int, Translator], rows: TuningRows, config: TunedLensConfig, final: FinalLayers, work: Workspace
) -> None:
    batches = (rows.read(prompts, final.device) for prompts in rows.sample("held_out", config.evaluation_rows))
    table = evaluation_table(row_sums(final, batch, translators) for batch in batches)
    with atomic.atomic_path(work.scratch / EVALUATION_FILE) as temp:
        table.to_parquet(temp, index=False)
    named: dict[str, Tensor] = {}
    for depth, item in translators.items():
        named |= {f"{hook_at(depth)}.weight": item.weight.cpu(), f"{hook_at(depth)}.bias": item.bias.cpu()}
    with atomic.atomic_path(work.scratch / TRANSLATORS_FILE) as temp:
        save_file(named, temp)
    unit_done(work, _EVALUATION, "held-out rows")


def write_tuned(config: TunedLensConfig, hooks: dict[int, str], work: Workspace) -> dict[str, Scalar]:
    """Write the files of the tuned lens from scratch; returns its main figures."""
    state = load_file(work.scratch / _STATE)
    work.write_table(TRAINING_FILE, pd.DataFrame(_history(config, hooks, state)))
    table = pd.read_parquet(work.scratch / EVALUATION_FILE)
    work.write_table(EVALUATION_FILE, table)
    work.write_tensors(TRANSLATORS_FILE, load_file(work.scratch / TRANSLATORS_FILE))
    return tuned_figures(table)


def _history(config: TunedLensConfig, hooks: dict[int, str], state: dict[str, Tensor]) -> Iterator[dict[str, object]]:
    for row, step in enumerate(config.checkpoints()):
        for column, depth in enumerate(hooks):
            known = {name: float(state[name][row, column]) for name in ("training_kl", "validation_kl")}
            yield {"step": step, "depth": depth, "hook": hook_at(depth), **known}


def _step_unit(step: int) -> str:
    return f"tuned/{step}"
