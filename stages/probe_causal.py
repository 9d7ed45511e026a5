"""The part of the stage `probes` that runs the model with activations moved along a probe's direction."""

from dataclasses import dataclass
from functools import partial

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mi_pipe.activations.prompt_agreement import check_prompts
from mi_pipe.activations.store import ActivationStore
from mi_pipe.core.errors import ConfigError
from mi_pipe.models.hook_points import layer_of, moved_hook
from mi_pipe.models.model import Model, as_logits
from mi_pipe.models.reading import Reading
from mi_pipe.models.source import ModelSource, source_hooks
from mi_pipe.patching.known_blocks import KnownBlocks
from mi_pipe.patching.metrics import PairInfo, find_metric, metric_of_logits
from mi_pipe.probes.causal import (
    PROBE,
    RANDOM,
    CausalBatch,
    CausalRun,
    LastMetric,
    ReadingDirection,
    make_batch,
    random_unit,
    reading_direction,
    run_moved,
)
from mi_pipe.probes.config import CausalConfig
from mi_pipe.prompts.prompt_set import PromptSet

_BATCH_TOKENS = 1024


def check_causal(
    hooks: list[str], model: ModelSource | None, prompts: PromptSet | None, store: ActivationStore
) -> None:
    """Raise ConfigError or HookPointError if the model cannot be run with these hook points moved."""
    if model is None or prompts is None:
        raise ConfigError(
            f"probes.causal runs the model on the prompts of {store.id}, and {'it' if model is None else 'they'} "
            "cannot be found: name the model, or leave causal out."
        )
    check_prompts(store, prompts)
    known, _ = source_hooks(model)
    for hook in hooks:
        if known[moved_hook(hook)].module_path is None:
            raise ConfigError(
                f"probes.causal: {hook} is no value of the model's own modules that could be moved; probe it without."
            )


@dataclass(frozen=True)
class Base:
    """Test prompts of a label at a position, and what the model's blocks return on them when nothing is moved."""

    model: Model
    batch: CausalBatch
    known: KnownBlocks

    def run(self, tokens: Int[Tensor, "prompt pos"]) -> Float[Tensor, "prompt d_vocab"]:
        """Return the logits after each prompt of the batch, or of its first ones; others are not unembedded."""
        rows = torch.arange(len(tokens), device=tokens.device)
        ends = self.batch.lengths.to(tokens.device)[rows] - 1
        with self.model.edited({"unembed.hook_in": lambda normed: normed[rows, ends][:, None]}):
            return as_logits(self.model.module(tokens))[:, 0]

    def run_from(self, hook: str) -> Float[Tensor, "prompt d_vocab"]:
        """Return the logits after each prompt, without computing blocks before a hook point."""
        tokens = self.batch.tokens.to(self.model.device)
        if layer_of(hook) is None:
            return self.run(tokens)
        with self.known.left_out(moved_hook(hook), torch.arange(len(tokens), device=tokens.device)):
            return self.run(tokens)


@torch.no_grad()
def causal_bases(
    config: CausalConfig,
    model: Model,
    prompts: PromptSet,
    store: ActivationStore,
    rows: Int[np.ndarray, " row"],
    hooks: list[str],
) -> list[Base]:
    """Return the first test prompts that have rows, in batches, with these rows marked, each batch run once."""
    found = []
    for batch in _batches(prompts, store, rows, config.max_prompts):
        base = Base(model, batch, KnownBlocks(model, [moved_hook(hook) for hook in hooks]))
        base.known.base(base.run, batch.tokens.to(model.device), len(batch.tokens))
        found.append(base)
    return found


def causal_frame(
    config: CausalConfig,
    model: Model,
    prompts: PromptSet,
    bases: list[Base],
    hook: str,
    later: dict[str, dict[str, Tensor]],
    deviation: float,
) -> pd.DataFrame:
    """Return one row a direction, amount, hook point read and prompt: `reading` and `metric`.

    `later` has the linear probes of this and later hook points; amount 0 is the model left alone.
    """
    directions = {name: reading_direction(item["weight"], item["bias"], item["pair"]) for name, item in later.items()}
    followed: dict[str, tuple[Reading, ReadingDirection]] = {}
    for name, direction in directions.items():
        reading = model.hooks[name].reading
        assert reading is not None, "the plan has refused it"
        followed[name] = (reading, ReadingDirection(direction.weight.to(model.device), direction.bias))
    unit = directions[hook].unit
    steps = {(PROBE, 0.0): torch.zeros_like(unit)}
    for name, along in ((PROBE, unit), (RANDOM, random_unit(len(unit), config.seed))):
        steps |= {(name, amount): amount * deviation * along for amount in config.amounts}
    parts: list[pd.DataFrame] = []
    for base in bases:
        metric = _metric(config.metric, prompts)
        for (name, amount), step in steps.items():
            run = run_moved(model, partial(base.run_from, hook), base.batch, hook, step, followed, metric)
            parts.append(_frame(run, base.batch, name, amount))
    return pd.concat(parts, ignore_index=True)


def _frame(run: CausalRun, batch: CausalBatch, direction: str, amount: float) -> pd.DataFrame:
    metric = np.full(len(batch.prompts), np.nan) if run.metric is None else run.metric
    return pd.concat(
        pd.DataFrame(
            {"direction": direction, "amount": amount, "read_hook": name, "prompt_idx": batch.prompts.astype(np.int32)}
            | {"reading": reading, "metric": metric}
        )
        for name, reading in run.readings.items()
    )


def _batches(
    prompts: PromptSet, store: ActivationStore, rows: Int[np.ndarray, " row"], max_prompts: int
) -> list[CausalBatch]:
    prompt_of = store.prompt_idx[rows]
    chosen = np.unique(prompt_of)[:max_prompts]
    longest = max(len(prompts.prompt(int(i))) for i in chosen)
    size = max(1, _BATCH_TOKENS // longest)
    found = []
    for start in range(0, len(chosen), size):
        some = chosen[start : start + size]
        here = np.isin(prompt_of, some)
        tokens = [prompts.prompt(int(i)) for i in some]
        found.append(make_batch(some, tokens, prompt_of[here], store.pos[rows[here]]))
    return found


def _metric(name: str, prompts: PromptSet) -> LastMetric | None:
    """Return the metric of prompts with answers; the first run it sees, the model left alone, is KL's clean run."""
    if not prompts.has_pairs:
        return None
    metric = find_metric(name)
    columns = {kind: torch.from_numpy(prompts.prompts[f"{kind}_id"].to_numpy(np.int64)) for kind in ("answer", "wrong")}
    clean: list[Tensor] = []

    def values(last: Float[Tensor, "prompt d_vocab"], chosen: Int[Tensor, " prompt"]) -> Float[Tensor, " prompt"]:
        clean.append(last) if not clean else None
        answers, wrongs = (columns[kind][chosen][:, None].to(last.device) for kind in ("answer", "wrong"))
        return metric_of_logits(metric, last, PairInfo(answers, wrongs, clean[0]))

    return values
