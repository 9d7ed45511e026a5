"""Stage `heads`: scores of every attention head on repeated random tokens, and attention patterns of task prompts.

Units of work are the sequences of one forward pass and the single prompts; their results wait in scratch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from jaxtyping import Int
from pydantic import Field, NonNegativeInt, PositiveInt
from safetensors.numpy import load_file, save_file
from torch import Tensor

from mi_pipe.attention.diagonals import DIAGONAL_SCORES, SCORES, score_table
from mi_pipe.attention.head_scores import LOSS_FILE, PATTERNS_FOLDER, SCORES_FILE
from mi_pipe.attention.pattern_store import prompt_patterns, write_patterns
from mi_pipe.attention.repeats import fitting_period, measure_repeats, repeated_sequences
from mi_pipe.attention.watching import check_patterns
from mi_pipe.core import atomic
from mi_pipe.core.config import Config, Execution
from mi_pipe.core.manifest import Scalar
from mi_pipe.core.stage import Estimate, Stage
from mi_pipe.core.workspace import Workspace
from mi_pipe.models.device import pick_device
from mi_pipe.models.info import ModelInfo
from mi_pipe.models.model import Model
from mi_pipe.models.source import ModelSource, load_source, source_hooks, source_vocabulary
from mi_pipe.patching.chunks import check_fits
from mi_pipe.prompts.prompt_set import PromptSet

_HALF_BYTES = 2
_TABLE_BYTES = 100_000


@dataclass(frozen=True)
class Inputs:
    """A model, and the tasks whose prompts' attention is stored."""

    model: ModelSource
    tasks: list[PromptSet]


class HeadsConfig(Config):
    """How heads are scored and how many patterns are kept."""

    n_sequences: PositiveInt = 10
    """Random sequences that heads are scored on."""
    period: Annotated[int, Field(ge=2)] = 50
    """Random tokens of a sequence before they repeat once; less where the model's context or vocabulary is smaller."""
    seed: NonNegativeInt = 0
    """Seed of the random tokens."""
    n_pattern_prompts: NonNegativeInt = 8
    """Clean prompts of each task whose attention patterns are stored, the first of the task."""
    device: Annotated[str, Execution()] = "auto"
    """auto, cuda, cuda:1, mps or cpu."""
    batch_tokens: Annotated[PositiveInt, Execution()] = 512
    """Tokens (sequences times positions) of one forward pass."""


@dataclass(frozen=True)
class _Prompt:
    """One prompt whose patterns are stored."""

    task: str
    index: int
    tokens: np.ndarray
    labels: list[str]

    @property
    def key(self) -> str:
        return f"{PATTERNS_FOLDER}/{self.task}/{self.index}"


def _prompts(config: HeadsConfig, inputs: Inputs) -> dict[str, list[_Prompt]]:
    """Return the prompts by task; tasks are called by their family, numbered where two are of one family."""
    found: dict[str, list[_Prompt]] = {}
    for i, task in enumerate(inputs.tasks):
        n_before = sum(other.family == task.family for other in inputs.tasks[:i])
        name = f"{task.family}-{n_before + 1}" if n_before else task.family
        clean = np.flatnonzero(task.prompts["role"].to_numpy() == "clean")[: config.n_pattern_prompts]
        found[name] = [_Prompt(name, int(row), task.prompt(int(row)), task.texts(int(row))) for row in clean]
    return found


def _batches(config: HeadsConfig, period: int) -> list[range]:
    rows = max(1, config.batch_tokens // (2 * period))
    return [range(start, min(start + rows, config.n_sequences)) for start in range(0, config.n_sequences, rows)]


def _check(config: HeadsConfig, inputs: Inputs) -> ModelInfo:
    pick_device(config.device)
    hooks, info = source_hooks(inputs.model)
    check_patterns(hooks, info.n_layers)
    for task in inputs.tasks:
        check_fits(task.pair_groups(), info, task.id)
    return info


def estimate(config: HeadsConfig, inputs: Inputs) -> Estimate:
    """Return the size of the stored patterns and the number of sequences and prompts."""
    info = _check(config, inputs)
    cells = 0
    n_prompts = 0
    for prompts in _prompts(config, inputs).values():
        longest = max((len(prompt.tokens) for prompt in prompts), default=0)
        cells += len(prompts) * info.n_layers * info.n_heads * longest**2
        n_prompts += len(prompts)
    return Estimate(2 * cells * _HALF_BYTES + _TABLE_BYTES, config.n_sequences + n_prompts, "sequences")


def run(config: HeadsConfig, inputs: Inputs, work: Workspace) -> dict[str, Scalar]:
    """Score heads and store patterns, leaving out what the ledger has."""
    info = _check(config, inputs)
    vocabulary = source_vocabulary(inputs.model)
    period = fitting_period(config.period, vocabulary, info)
    batches = _batches(config, period)
    tasks = _prompts(config, inputs)
    prompts = [prompt for task in tasks.values() for prompt in task]
    work.ledger.expect(len(batches) + len(prompts))
    if work.ledger.n_done < len(batches) + len(prompts):
        model = load_source(inputs.model, config.device)
        tokens = repeated_sequences(vocabulary, info, config.n_sequences, period, config.seed)
        for batch in batches:
            _do(work, _batch_key(batch), lambda batch=batch: _measure(model, tokens[batch.start : batch.stop], period))
        for prompt in prompts:
            _do(work, prompt.key, lambda prompt=prompt: {"pattern": prompt_patterns(model, prompt.tokens)})
    for name, rows in tasks.items():
        _write_task(work, name, rows, inputs.model.id, info)
    return _write_scores(config, work, [_batch_key(batch) for batch in batches], period)


def _measure(model: Model, tokens: Int[Tensor, "sequence pos"], period: int) -> dict[str, np.ndarray]:
    results = measure_repeats(model, tokens, period)
    return {"scores": results.scores, "losses": results.losses}


def _write_task(work: Workspace, task: str, prompts: list[_Prompt], model_id: str, info: ModelInfo) -> None:
    if not prompts:
        return
    write_patterns(
        work.path(f"{PATTERNS_FOLDER}/{task}.zarr"),
        [prompt.index for prompt in prompts],
        [prompt.tokens for prompt in prompts],
        (_read(work, prompt.key)["pattern"] for prompt in prompts),
        (info.n_layers, info.n_heads),
        {"task": task, "model": model_id, "labels": [prompt.labels for prompt in prompts]},
    )


def _write_scores(config: HeadsConfig, work: Workspace, keys: list[str], period: int) -> dict[str, Scalar]:
    parts = [_read(work, key) for key in keys]
    scores = np.concatenate([part["scores"] for part in parts]).mean(axis=0)
    first, second = (float(loss) for loss in np.concatenate([part["losses"] for part in parts]).mean(axis=0))
    work.write_table(SCORES_FILE, score_table(scores))
    measured = {"n_sequences": config.n_sequences, "period": period}
    work.write_json(LOSS_FILE, {"first_half": first, "second_half": second, **measured})
    figures: dict[str, Scalar] = {"first_half_loss": first, "second_half_loss": second, "period": period}
    for name in DIAGONAL_SCORES:
        values = scores[:, :, SCORES.index(name)]
        layer, head = np.unravel_index(int(values.argmax()), values.shape)
        figures |= {f"{name}_head": f"{layer}.{head}", f"{name}_score": float(values[layer, head])}
    return figures


def _batch_key(batch: range) -> str:
    return f"repeated/{batch.start}-{batch.stop}"


def _do(work: Workspace, key: str, measure: Callable[[], dict[str, np.ndarray]]) -> None:
    """Measure and store one unit of work, unless it is done."""
    if key in work.ledger:
        return
    with atomic.atomic_path(_file(work, key)) as temp:
        save_file(measure(), temp)
    work.ledger.mark(key)
    work.progress.update(work.ledger.n_done, work.ledger.n_total or 0, "units", key)


def _read(work: Workspace, key: str) -> dict[str, np.ndarray]:
    return load_file(_file(work, key))


def _file(work: Workspace, key: str) -> Path:
    return work.scratch / f"{key}.safetensors"


STAGE = Stage(name="heads", version=1, config=HeadsConfig, inputs=Inputs, run=run, estimate=estimate)
