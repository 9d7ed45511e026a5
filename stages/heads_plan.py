"""What the stage `heads` measures, decided before any weights load: its config, and its units of work."""

import logging
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from pydantic import Field, NonNegativeInt, PositiveInt

from mi_pipe.attention.head_scores import PATTERNS_FOLDER
from mi_pipe.attention.repeats import fitting_period
from mi_pipe.attention.watching import check_patterns
from mi_pipe.core.config import Config, Execution
from mi_pipe.core.errors import HookPointError
from mi_pipe.heads.classes import Thresholds
from mi_pipe.heads.composition import KINDS
from mi_pipe.heads.direct_logit_attribution import check_direct_logit_attribution
from mi_pipe.heads.evidence import TASK_PLACES
from mi_pipe.heads.random_sequences import REPEATS
from mi_pipe.models.device import pick_device
from mi_pipe.models.head_weights import check_head_weights
from mi_pipe.models.info import ModelInfo
from mi_pipe.models.source import ModelSource, source_hooks, source_vocabulary
from mi_pipe.patching.chunks import Chunk, check_fits, choose_pairs, chunks_of
from mi_pipe.prompts.prompt_set import PairGroup, PromptSet

_log = logging.getLogger(__name__)
_COPIES = 2


@dataclass(frozen=True)
class Inputs:
    """A model, and the tasks on whose prompts its heads are watched."""

    model: ModelSource
    tasks: list[PromptSet]


class HeadsConfig(Config):
    """What is measured of every head."""

    n_sequences: PositiveInt = 10
    """Random sequences that heads are scored on."""
    period: Annotated[int, Field(ge=2)] = 50
    """Random tokens of a sequence before they repeat once; less where the model's context or vocabulary is smaller."""
    prefix_period: Annotated[int, Field(ge=2)] = 25
    """Random tokens that are written four times, for prefix matching and copying; less likewise."""
    seed: NonNegativeInt = 0
    """Seed of the random tokens."""
    n_pattern_prompts: NonNegativeInt = 8
    """Clean prompts of each task whose attention patterns are stored, the first of the task."""
    max_pairs: PositiveInt = 32
    """Pairs of each task whose attention and direct logit attribution are measured, the first of the task."""
    name_pairs: PositiveInt = 8
    """Pairs whose three names are fed to every head's OV circuit, where a task has names (indirect objects)."""
    composition: bool = True
    """Score Q-, K- and V-composition of all pairs of heads."""
    baseline_draws: NonNegativeInt = 32
    """Pairs of heads with random weights whose composition is the baseline beside the scores; 0 for none."""
    fold_norms: bool = False
    """Fold the weights of the norms into what heads read and the unembedding, for scores of weights alone
    (composition, eigenvalues), as TransformerLens' compatibility mode does; raw weights otherwise."""
    thresholds: Thresholds = Thresholds()
    """From where on evidence speaks for a class of heads."""
    device: Annotated[str, Execution()] = "auto"
    """auto, cuda, cuda:1, mps or cpu."""
    batch_tokens: Annotated[PositiveInt, Execution()] = 512
    """Tokens (sequences times positions) of one forward pass."""


@dataclass(frozen=True)
class StoredPrompt:
    """One prompt whose patterns are stored."""

    task: str
    index: int
    tokens: np.ndarray
    labels: list[str]

    @property
    def key(self) -> str:
        """The unit of work."""
        return f"{PATTERNS_FOLDER}/{self.task}/{self.index}"


@dataclass(frozen=True)
class TaskPlan:
    """What is measured of one task."""

    name: str
    groups: list[PairGroup]
    """The chosen pairs."""
    chunks: list[Chunk]
    prompts: list[StoredPrompt]

    @property
    def has_names(self) -> bool:
        """Say whether this is indirect object identification, with a subject and an indirect object."""
        return all(place in self.groups[0].places for place in TASK_PLACES)

    def key(self, chunk: Chunk) -> str:
        """Return the unit of work of a chunk."""
        return f"pairs/{self.name}/{chunk.name}"


@dataclass(frozen=True)
class HeadsPlan:
    """All units of work, in order."""

    info: ModelInfo
    period: int
    repeated: list[range]
    random: list[range]
    tasks: list[TaskPlan]
    refused: dict[str, str]
    """What cannot be measured of this architecture, and why."""
    composition: bool

    @property
    def names_task(self) -> TaskPlan | None:
        """The first task with names."""
        return next((task for task in self.tasks if task.has_names), None)

    @property
    def knows_weights(self) -> bool:
        """Say whether the weights of single heads are known."""
        return "weights" not in self.refused

    @property
    def keys(self) -> list[str]:
        """Return the names of all units."""
        found = [batch_key("repeated", batch) for batch in self.repeated]
        found += [prompt.key for task in self.tasks for prompt in task.prompts]
        found += [task.key(chunk) for task in self.tasks for chunk in task.chunks]
        if self.knows_weights:
            found += [batch_key("random", batch) for batch in self.random]
            found += ["eigenvalues", *(f"composition/{kind}" for kind in KINDS if self.composition)]
        if self.knows_weights and self.names_task is not None:
            found += [*(f"names/{layer}" for layer in range(self.info.n_layers)), "inhibition"]
        return found


def make_plan(config: HeadsConfig, inputs: Inputs) -> HeadsPlan:
    """Check what can be checked without weights, and list the units."""
    pick_device(config.device)
    hooks, info = source_hooks(inputs.model)
    check_patterns(hooks, info.n_layers)
    refused = {}
    for part, check in (("weights", check_head_weights), ("attribution", check_direct_logit_attribution)):
        try:
            check(hooks, info)
        except HookPointError as reason:
            _log.warning("%s", reason)
            refused[part] = str(reason)
    period = fitting_period(config.period, source_vocabulary(inputs.model), info)
    return HeadsPlan(
        info=info,
        period=period,
        repeated=_batches(config, _COPIES * period),
        random=_batches(config, REPEATS * config.prefix_period),
        tasks=_tasks(config, inputs, info),
        refused=refused,
        composition=config.composition and info.n_layers > 1,
    )


def batch_key(kind: str, batch: range) -> str:
    """Return the unit of work of a batch of sequences."""
    return f"{kind}/{batch.start}-{batch.stop}"


def _batches(config: HeadsConfig, n_pos: int) -> list[range]:
    rows = max(1, config.batch_tokens // n_pos)
    return [range(start, min(start + rows, config.n_sequences)) for start in range(0, config.n_sequences, rows)]


def _tasks(config: HeadsConfig, inputs: Inputs, info: ModelInfo) -> list[TaskPlan]:
    """Return the tasks; they are called by their family, numbered where two are of one family."""
    found: list[TaskPlan] = []
    for i, task in enumerate(inputs.tasks):
        check_fits(task.pair_groups(), info, task.id)
        n_before = sum(other.family == task.family for other in inputs.tasks[:i])
        name = f"{task.family}-{n_before + 1}" if n_before else task.family
        clean = np.flatnonzero(task.prompts["role"].to_numpy() == "clean")[: config.n_pattern_prompts]
        prompts = [StoredPrompt(name, int(row), task.prompt(int(row)), task.texts(int(row))) for row in clean]
        groups = choose_pairs(task.pair_groups(), config.max_pairs)
        found.append(TaskPlan(name, groups, chunks_of(groups), prompts))
    return found
