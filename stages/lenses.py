"""Stage `lenses`: the logit lens on task prompts by depth and position, and a tuned lens trained on a store's rows.

Units of work are the stretches of training between validations, the evaluation, and batches of prompts; what they give
waits in scratch.
"""

from dataclasses import dataclass
from typing import Annotated

import numpy as np
import pandas as pd
import torch
from pydantic import Field, PositiveInt
from safetensors.numpy import load_file as load_arrays
from safetensors.numpy import save_file as save_arrays

from mi_pipe.activations.prompt_agreement import check_prompts
from mi_pipe.activations.store import ActivationStore
from mi_pipe.core import atomic
from mi_pipe.core.config import Config, Execution
from mi_pipe.core.errors import ConfigError
from mi_pipe.core.manifest import Scalar
from mi_pipe.core.stage import Estimate, Stage
from mi_pipe.core.vocabulary import texts
from mi_pipe.core.workspace import Workspace
from mi_pipe.lenses import lens_readings as files
from mi_pipe.lenses.config import TunedLensConfig
from mi_pipe.lenses.depths import hook_at, residual_hooks
from mi_pipe.lenses.final_layers import FinalLayers
from mi_pipe.lenses.final_residuals import LiveFinal, StoredFinal
from mi_pipe.lenses.main_figures import task_figures
from mi_pipe.lenses.residuals import reading_at, run_residuals
from mi_pipe.lenses.task_arrays import NO_TOKEN, choices_of, read_chunk, task_dataset
from mi_pipe.lenses.translators import Translator
from mi_pipe.models.device import pick_device
from mi_pipe.models.info import ModelInfo
from mi_pipe.models.model import Model
from mi_pipe.models.source import ModelSource, load_source, source_hooks, source_vocabulary
from mi_pipe.patching.chunks import Chunk, check_fits, choose_pairs, chunks_of
from mi_pipe.prompts.prompt_set import PromptSet
from stages.lens_tuning import n_units, tune, unit_done, write_tuned

_FLOAT_BYTES = 4
_FIGURES = 10
_TABLE_BYTES = 200_000
_CHUNK_TOKENS = 512
_CHECK_TOKENS = 8
_SCRATCH_COPIES = 9
"""Of each translator: parameters, the best ones and two moments in scratch, with a checkpoint while it is replaced."""
_CHECK = "check"


@dataclass(frozen=True)
class Inputs:
    """A model and the tasks that are read; for a tuned lens the activations it is trained on and their prompts."""

    model: ModelSource
    tasks: list[PromptSet]
    activations: ActivationStore | None = None
    prompts: PromptSet | None = None


class LensesConfig(Config):
    """What is read through lenses."""

    max_prompts: PositiveInt | None = 32
    """Clean prompts of each task that are read, the first of the task; null for all."""
    n_top: Annotated[int, Field(ge=1, le=100)] = 5
    """Likeliest tokens that are kept at each depth and position."""
    tuned: TunedLensConfig | None = None
    """Train a tuned lens on the recipe's activations, and read with it too; {} for the defaults."""
    device: Annotated[str, Execution()] = "auto"
    """auto, cuda, cuda:1, mps or cpu."""


@dataclass(frozen=True)
class _Plan:
    """What will be done, known before any weight is read."""

    info: ModelInfo
    tasks: dict[str, list[Chunk]]
    hooks: dict[int, str]
    """Hook points of the store, by depth; none without a tuned lens."""

    @property
    def trained(self) -> dict[int, str]:
        return {depth: hook for depth, hook in self.hooks.items() if depth < self.info.n_layers}

    def n_work(self, config: LensesConfig) -> int:
        return 1 + n_units(config.tuned) + sum(map(len, self.tasks.values()))


def _plan(config: LensesConfig, inputs: Inputs) -> _Plan:
    pick_device(config.device)
    hooks, info = source_hooks(inputs.model)
    for depth in range(info.n_layers + 1):
        reading_at(hooks, depth)
    tasks: dict[str, list[Chunk]] = {}
    for i, task in enumerate(inputs.tasks):
        groups = choose_pairs(task.pair_groups(), config.max_prompts)
        check_fits(groups, info, task.id)
        n_before = sum(other.family == task.family for other in inputs.tasks[:i])
        longest = max(group.n_pos for group in groups)
        name = f"{task.family}-{n_before + 1}" if n_before else task.family
        tasks[name] = chunks_of(groups, max(1, _CHUNK_TOKENS // longest))
    return _Plan(info, tasks, _stored_hooks(config, inputs, info))


def _stored_hooks(config: LensesConfig, inputs: Inputs, info: ModelInfo) -> dict[int, str]:
    """Return the store's residual hook points by depth; raises ConfigError where no tuned lens can be trained."""
    if config.tuned is None:
        return {}
    config.tuned.check()
    if inputs.activations is None:
        raise ConfigError("lenses.tuned is trained on activations: add a section harvest, or the key activations.")
    hooks = residual_hooks(inputs.activations.hooks, info.n_layers)
    for hook in hooks.values():
        if inputs.activations.width(hook) != info.d_model:
            width = inputs.activations.width(hook)
            raise ConfigError(f"{hook} of {inputs.activations.id} is {width} wide, and the model {info.d_model}.")
    if info.n_layers not in hooks:
        if inputs.prompts is None:
            raise ConfigError(
                f"{inputs.activations.id} has no {hook_at(info.n_layers)}, of which final logits are made, and its "
                "prompts are not there to run the model on. Harvest it, or give the recipe the prompts."
            )
        check_prompts(inputs.activations, inputs.prompts)
    return hooks


def estimate(config: LensesConfig, inputs: Inputs) -> Estimate:
    """Return the size of arrays and translators, and the units of work."""
    plan = _plan(config, inputs)
    cells = 0
    for chunks in plan.tasks.values():
        longest = max(chunk.group.n_pos for chunk in chunks)
        cells += sum(chunk.group.n_pairs for chunk in chunks) * longest * (plan.info.n_layers + 1)
    size = 2 * cells * (1 + bool(config.tuned)) * (_FIGURES + 2 * config.n_top) * _FLOAT_BYTES
    size += _SCRATCH_COPIES * len(plan.trained) * plan.info.d_model**2 * _FLOAT_BYTES
    return Estimate(size + _TABLE_BYTES, plan.n_work(config), "units")


def run(config: LensesConfig, inputs: Inputs, work: Workspace) -> dict[str, Scalar]:
    """Train the tuned lens and read the prompts, leaving out what the ledger has, and write the artifact."""
    plan = _plan(config, inputs)
    work.ledger.expect(plan.n_work(config))
    if work.ledger.n_done < plan.n_work(config):
        model = load_source(inputs.model, config.device)
        final = FinalLayers(model)
        _check(model, final, work)
        translators: dict[int, Translator] = {}
        if config.tuned:
            translators = _tuned(config.tuned, plan, inputs, model, final, work)
        for name, chunks in plan.tasks.items():
            for chunk in chunks:
                _read(config, name, chunk, model, final, translators, work)
    figures = write_tuned(config.tuned, plan.trained, work) if config.tuned else {}
    return {**_write_tasks(plan, inputs, work), **figures}


def _check(model: Model, final: FinalLayers, work: Workspace) -> None:
    """Compare the lens at the last depth with the model's logits, before anything is read through it."""
    if _CHECK in work.ledger:
        return
    depth = model.info.n_layers
    tokens = torch.arange(_CHECK_TOKENS)[None] % model.info.d_vocab
    residuals, logits = run_residuals(model, tokens[:, : model.info.n_ctx], [depth])
    unit_done(work, _CHECK, "comparing with the model's logits", error=final.check(residuals[depth], logits))


def _tuned(
    config: TunedLensConfig, plan: _Plan, inputs: Inputs, model: Model, final: FinalLayers, work: Workspace
) -> dict[int, Translator]:
    """Train the tuned lens; final logits come from the stored last depth, or from runs on the prompts."""
    assert inputs.activations is not None, "the plan has refused it"
    last = plan.hooks.get(plan.info.n_layers)
    if last is not None:
        residuals = StoredFinal(inputs.activations, last)
    else:
        assert inputs.prompts is not None, "the plan has refused it"
        residuals = LiveFinal(inputs.activations, model, inputs.prompts)
    return tune(config, plan.trained, residuals, inputs.activations, final, work)


def _read(
    config: LensesConfig,
    task: str,
    chunk: Chunk,
    model: Model,
    final: FinalLayers,
    translators: dict[int, Translator],
    work: Workspace,
) -> None:
    """Read one batch of prompts at every depth, unless it is done."""
    unit = _chunk_unit(task, chunk)
    if unit in work.ledger:
        return
    residuals, logits = run_residuals(model, chunk.group.clean, range(model.info.n_layers + 1))
    group = chunk.group
    choices = choices_of(group.clean, group.answer, group.wrong).to(model.device)
    arrays = read_chunk(final, dict(sorted(residuals.items())), logits, choices, translators, config.n_top)
    with atomic.atomic_path(work.scratch / f"{unit}.safetensors") as temp:
        save_arrays(arrays, temp)
    unit_done(work, unit, f"{task}, prompts of {group.n_pos} tokens")


def _write_tasks(plan: _Plan, inputs: Inputs, work: Workspace) -> dict[str, Scalar]:
    """Write each task's arrays and the texts of all tokens in them; returns the figures of the first task."""
    seen: set[int] = set()
    figures: dict[str, Scalar] = {}
    for (name, chunks), task in zip(plan.tasks.items(), inputs.tasks, strict=True):
        clean = task.prompts[task.prompts["role"] == "clean"].set_index("pair")["prompt_idx"]
        pairs = np.concatenate([chunk.group.pairs for chunk in chunks])
        tokens = [row for chunk in chunks for row in chunk.group.clean]
        parts = [
            (load_arrays(work.scratch / f"{_chunk_unit(name, chunk)}.safetensors"), chunk.rows) for chunk in chunks
        ]
        dataset = task_dataset(parts, clean.loc[pairs].to_numpy(), tokens, plan.info.n_layers + 1)
        answers = {
            kind: np.concatenate([getattr(c.group, kind).numpy() for c in chunks]) for kind in ("answer", "wrong")
        }
        dataset = dataset.assign({f"{kind}_id": ("prompt", ids.astype(np.int32)) for kind, ids in answers.items()})
        dataset.attrs |= {"task": name, "task_id": task.id, "model": inputs.model.id}
        dataset.to_zarr(work.path(f"{files.TASKS_FOLDER}/{name}.zarr"), mode="w", zarr_format=3, consolidated=False)
        for ids in (dataset["top_id"].to_numpy(), dataset["token_id"].to_numpy(), *answers.values()):
            seen |= set(np.unique(ids).tolist()) - {NO_TOKEN}
        figures = figures or task_figures(dataset, _lengths(chunks))
    table = pd.DataFrame({"token_id": np.array(sorted(seen), np.int32)})
    table["text"] = texts(source_vocabulary(inputs.model), sorted(seen))
    work.write_table(files.TOKENS_FILE, table.astype({"text": "str"}))
    return {"n_prompts": sum(c.group.n_pairs for chunks in plan.tasks.values() for c in chunks), **figures}


def _lengths(chunks: list[Chunk]) -> np.ndarray:
    return np.concatenate([np.full(chunk.group.n_pairs, chunk.group.n_pos) for chunk in chunks])


def _chunk_unit(task: str, chunk: Chunk) -> str:
    return f"tasks/{task}/{chunk.name}"


STAGE = Stage(name="lenses", version=2, config=LensesConfig, inputs=Inputs, run=run, estimate=estimate)
