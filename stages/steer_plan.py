"""What a run of the stage `steer` will do, known before any weight of the model is read."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from mi_pipe.core.errors import ConfigError, PromptError
from mi_pipe.core.vocabulary import Vocabulary
from mi_pipe.models.device import pick_device
from mi_pipe.models.hook_points import HookMap
from mi_pipe.models.info import ModelInfo
from mi_pipe.models.source import ModelSource, source_hooks, source_vocabulary
from mi_pipe.patching.chunks import Chunk, check_fits, choose_pairs, chunks_of
from mi_pipe.patching.metrics import find_metric
from mi_pipe.probes.probe_set import ProbeSet
from mi_pipe.prompts.prompt_set import PromptSet
from mi_pipe.saes.sae_set import SAESet
from mi_pipe.steering.batches import Tokens, check_room, encode_prompts
from mi_pipe.steering.choosing import held_out, prompts_where
from mi_pipe.steering.config import ContrastConfig, DirectionConfig, SteeringConfig
from mi_pipe.steering.direction import Direction, check_hook, check_width, from_feature, from_probe

_SCALE_PROMPTS = 32
_FEW_TOKENS = 2000
"""Below this the mean loss of text is uncertain by some tenths of a nat (docs/steering.md)."""
DIRECTIONS = "directions"


@dataclass(frozen=True)
class Inputs:
    """A model; tasks whose metric is read, text for the loss; and what directions are made from."""

    model: ModelSource
    tasks: list[PromptSet]
    prompts: PromptSet | None = None
    contrasts: list[PromptSet] | None = None
    """The sets that contrasts choose from, in the order of `SteeringConfig.contrast_sets`."""
    probes: ProbeSet | None = None
    saes: SAESet | None = None


@dataclass(frozen=True)
class Contrast:
    """The prompts of both sides."""

    positive: list[Tokens]
    negative: list[Tokens]


@dataclass(frozen=True)
class TextChunk:
    """Prompts of one length for the loss."""

    key: str
    prompts: Int[np.ndarray, " prompt"]


@dataclass(frozen=True)
class Plan:
    """What will be done."""

    info: ModelInfo
    directions: dict[str, Direction | Contrast]
    """Those of contrasts wait for the model."""
    tasks: dict[str, list[Chunk]]
    text: list[TextChunk]
    scaling: list[Tokens]
    """Prompts that scales are measured on."""
    beginnings: list[Tokens]
    """Prompts that are continued."""
    notes: tuple[str, ...]

    @property
    def keys(self) -> list[str]:
        """Every unit of work."""
        chunks = [task_key(name, chunk) for name, chunks in self.tasks.items() for chunk in chunks]
        return [DIRECTIONS, *chunks, *(chunk.key for chunk in self.text), *map(text_key, self.writers)]

    @property
    def writers(self) -> list[str]:
        """Under which directions texts are written; "" is none."""
        return ["", *self.directions] if self.beginnings else []


def task_key(task: str, chunk: Chunk) -> str:
    """Name a unit by the pairs it covers, so that another batch size never takes it for its own."""
    return f"metric/{task}.{chunk.group.n_pos}tokens.{chunk.rows.start}-{chunk.rows.stop}"


def text_key(direction: str) -> str:
    """Name the unit of the texts written under a direction."""
    return f"texts/{direction or 'unsteered~'}"


def make_plan(config: SteeringConfig, inputs: Inputs) -> Plan:
    """Return the plan; raises what is wrong with device, metric, directions or prompts."""
    pick_device(config.device)
    find_metric(config.metric)
    hooks, info = source_hooks(inputs.model)
    sets = dict(zip(config.contrast_sets, inputs.contrasts or [], strict=True))
    vocabulary = source_vocabulary(inputs.model)
    directions = {
        name: _direction(name, item, inputs, hooks, info, vocabulary, sets) for name, item in config.directions.items()
    }
    tasks = _tasks(config, inputs, info)
    chosen = _text(config, inputs, info, directions)
    clean = [row.numpy() for chunks in tasks.values() for chunk in chunks for row in chunk.group.clean]
    text = [inputs.prompts.prompt(int(i)) for i in chosen] if inputs.prompts is not None else []
    scaling = (text or clean)[:_SCALE_PROMPTS]
    if not scaling and any(item.measures_scale for item in config.directions.values()):
        raise ConfigError(
            "steering: the scale of a feature, and the scale norm, are measured on prompts: add a section prompts or "
            "tasks, or give the scale as a number."
        )
    beginnings = _beginnings(config, clean, text, info, vocabulary)
    chunks, notes = _chunked(chosen, text, config.batch_tokens), _notes(config, inputs, text)
    return Plan(info, directions, tasks, chunks, scaling, beginnings, notes)


def _notes(config: SteeringConfig, inputs: Inputs, text: Sequence[Tokens]) -> tuple[str, ...]:
    """Say what of the loss on text will be missing or uncertain."""
    if config.perplexity is None:
        return ()
    if inputs.prompts is None:
        return ("no loss on text without a section prompts",)
    n_tokens = sum(len(prompt) - 1 for prompt in text)
    few = f"loss on {n_tokens:,} tokens of text alone: give more prompts, or raise perplexity.n_prompts"
    return (few,) if n_tokens < _FEW_TOKENS else ()


def _direction(
    name: str,
    item: DirectionConfig,
    inputs: Inputs,
    hooks: HookMap,
    info: ModelInfo,
    vocabulary: Vocabulary,
    sets: dict[str, PromptSet],
) -> Direction | Contrast:
    if item.contrast is not None:
        check_hook(hooks, item.hook or "")
        contrast = Contrast(*(_side(item.contrast, side, vocabulary, sets) for side in ("positive", "negative")))
        check_room([*contrast.positive, *contrast.negative], 0, info)
        return contrast
    if item.probe is not None:
        if inputs.probes is None:
            raise ConfigError(f"steering.directions.{name} is of a probe, and there are no probes to take it from.")
        position = item.probe.position_of(inputs.probes.positions)
        found = from_probe(inputs.probes, item.probe.label, item.hook or "", position)
    else:
        assert item.feature is not None, "the config has one source"
        if inputs.saes is None:
            raise ConfigError(
                f"steering.directions.{name} is of an SAE's feature, and there are no SAEs to take it from."
            )
        found = from_feature(inputs.saes[item.feature.sae], item.feature.index, item.hook)
    check_width(hooks, found)
    return found


def _side(contrast: ContrastConfig, side: str, vocabulary: Vocabulary, sets: dict[str, PromptSet]) -> list[Tokens]:
    chosen = getattr(contrast, side)
    if contrast.prompts is None:
        return encode_prompts(vocabulary, chosen, contrast.prepend_bos)
    prompts = sets[contrast.prompts]
    return [prompts.prompt(int(i)) for i in prompts_where(prompts, chosen, contrast.max_prompts)]


def _tasks(config: SteeringConfig, inputs: Inputs, info: ModelInfo) -> dict[str, list[Chunk]]:
    """Return each task's pairs in chunks of one forward pass; tasks are named by family, as elsewhere."""
    found: dict[str, list[Chunk]] = {}
    for i, task in enumerate(inputs.tasks):
        groups = choose_pairs(task.pair_groups(), config.max_pairs)
        check_fits(groups, info, task.id)
        n_before = sum(other.family == task.family for other in inputs.tasks[:i])
        longest = max(group.n_pos for group in groups)
        name = f"{task.family}-{n_before + 1}" if n_before else task.family
        found[name] = chunks_of(groups, max(1, config.batch_tokens // longest))
    return found


def _text(
    config: SteeringConfig, inputs: Inputs, info: ModelInfo, directions: dict[str, Direction | Contrast]
) -> Int[np.ndarray, " prompt"]:
    """Return the prompts for the loss, shortest first; none of them has the tokens of a prompt of a contrast."""
    if config.perplexity is None or inputs.prompts is None:
        return np.empty(0, np.int64)
    contrasts = [known for known in directions.values() if isinstance(known, Contrast)]
    used = [prompt for contrast in contrasts for prompt in (*contrast.positive, *contrast.negative)]
    chosen = held_out(inputs.prompts, config.perplexity.n_prompts, config.perplexity.seed, used)
    check_room([inputs.prompts.prompt(int(i)) for i in chosen], 0, info)
    return chosen[np.argsort(np.diff(inputs.prompts.offsets)[chosen], kind="stable")]


def _chunked(chosen: Int[np.ndarray, " prompt"], text: Sequence[Tokens], batch_tokens: int) -> list[TextChunk]:
    lengths = np.array([len(prompt) for prompt in text], np.int64)
    chunks: list[TextChunk] = []
    for length in np.unique(lengths):
        rows = chosen[lengths == length]
        size = max(1, batch_tokens // int(length))
        for start in range(0, len(rows), size):
            some = rows[start : start + size]
            chunks.append(TextChunk(f"loss/{length}tokens.{start}-{start + len(some)}", some))
    return chunks


def _beginnings(
    config: SteeringConfig,
    clean: Sequence[Tokens],
    text: Sequence[Tokens],
    info: ModelInfo,
    vocabulary: Vocabulary,
) -> list[Tokens]:
    writing = config.generation
    if writing is None:
        return []
    if writing.prompts is not None:
        found = encode_prompts(vocabulary, writing.prompts, writing.prepend_bos)
    else:
        found = list(clean or [prompt[: writing.prompt_tokens] for prompt in text])[: writing.n_prompts]
    if not found:
        raise PromptError("steering.generation has no prompts to continue: give texts (prompts), or null for none.")
    check_room(found, writing.n_tokens, info)
    return found
