"""The units of work of the stage `heads`: what each measures, as arrays that wait in scratch."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file, save_file

from mi_pipe.attention.pattern_store import prompt_patterns
from mi_pipe.attention.repeats import measure_repeats, repeated_sequences
from mi_pipe.core import atomic
from mi_pipe.core.errors import ModelError, StageError
from mi_pipe.core.workspace import Workspace
from mi_pipe.heads.composition import KINDS, composition
from mi_pipe.heads.direct_logit_attribution import DirectLogitAttribution, direct_logit_attribution
from mi_pipe.heads.eigenvalue_copying import full_ov_eigenvalue_copying, ov_eigenvalue_copying, token_map
from mi_pipe.heads.folding import folded_weights
from mi_pipe.heads.inhibition import Head, InhibitionPrompts, attention_losses
from mi_pipe.heads.name_copying import PLACES, Names, name_copying, read_names
from mi_pipe.heads.prompt_attention import measure_attention, named_positions
from mi_pipe.heads.random_sequences import Sequences, measure_random, random_sequences
from mi_pipe.models.head_weights import HeadWeights, head_weights
from mi_pipe.models.model import Model
from mi_pipe.patching.chunks import Chunk, choose_pairs
from stages.heads_plan import HeadsConfig, HeadsPlan, batch_key

_log = logging.getLogger(__name__)
Arrays = dict[str, np.ndarray]
REFUSED = "refused"


class Units:
    """Units of work, done once: a unit is done when the ledger has it, and its arrays are in scratch."""

    def __init__(self, work: Workspace) -> None:
        """Keep units in the workspace's scratch."""
        self.work = work

    def do(self, key: str, measure: Callable[[], Arrays]) -> None:
        """Measure and store one unit, unless it is done."""
        work = self.work
        if key in work.ledger:
            return
        with atomic.atomic_path(self._file(key)) as temp:
            save_file({name: np.ascontiguousarray(values) for name, values in measure().items()}, temp)
        work.ledger.mark(key)
        work.progress.update(work.ledger.n_done, work.ledger.n_total or 0, "units", key)

    def read(self, key: str) -> Arrays:
        """Return the arrays of a unit that is done."""
        return load_file(self._file(key))

    def _file(self, key: str) -> Path:
        return self.work.scratch / f"{key}.safetensors"


@dataclass(frozen=True)
class Measurements:
    """Measures everything that one plan asks of one loaded model."""

    config: HeadsConfig
    plan: HeadsPlan
    model: Model

    def run(self, units: Units) -> None:
        """Do all units but the last, which depends on what the others found."""
        self._sequences(units)
        for task in self.plan.tasks:
            for prompt in task.prompts:
                units.do(prompt.key, lambda tokens=prompt.tokens: {"pattern": prompt_patterns(self.model, tokens)})
            for chunk in task.chunks:
                units.do(task.key(chunk), lambda chunk=chunk: self._pairs(chunk))
        if self.plan.knows_weights:
            self._weights(units)

    def inhibition(self, heads: list[Head], receivers: list[Head]) -> Arrays:
        """Return the loss of the receivers' attention to the indirect object for each head, mean over pairs."""
        task = self.plan.names_task
        assert task is not None, "asked only where a task has names"
        losses = np.full((self.plan.info.n_layers, self.plan.info.n_heads), np.nan)
        if heads and receivers:
            parts = []
            for group in choose_pairs(task.groups, self.config.name_pairs):
                prompts = InhibitionPrompts(group.clean, group.corrupted, torch.from_numpy(group.places["io"]))
                parts.append(attention_losses(self.model, prompts, heads, receivers))
            for (layer, head), loss in zip(heads, np.concatenate(parts, axis=1).mean(axis=1), strict=True):
                losses[layer, head] = loss
        return {"losses": losses}

    def _sequences(self, units: Units) -> None:
        model, config, plan = self.model, self.config, self.plan
        tokens = repeated_sequences(model.vocabulary, model.info, config.n_sequences, plan.period, config.seed)

        def repeated(batch: range) -> Arrays:
            results = measure_repeats(model, tokens[batch.start : batch.stop], plan.period)
            return {"scores": results.scores, "losses": results.losses}

        for batch in plan.repeated:
            units.do(batch_key("repeated", batch), lambda batch=batch: repeated(batch))
        if not plan.knows_weights:
            return
        found = random_sequences(model.vocabulary, model.info, config.n_sequences, config.prefix_period, config.seed)
        for batch in plan.random:
            part = Sequences(found.tokens[batch.start : batch.stop], found.period)
            units.do(batch_key("random", batch), lambda part=part: {"scores": measure_random(model, part)})

    def _pairs(self, chunk: Chunk) -> Arrays:
        """Return attention on the clean prompts of a chunk, and the attribution of their logit difference."""
        group = chunk.group
        places = named_positions(group.places, group.n_pos)
        where = np.stack(list(places.values()), 1) if places else np.zeros((group.n_pairs, 0), np.int64)
        attention = measure_attention(self.model, group.clean, where)
        return {"habits": attention.habits, "places": attention.places} | self._attribution(chunk)

    def _attribution(self, chunk: Chunk) -> Arrays:
        """Return the attribution's fields, or why there is none."""
        if self.plan.refused:
            return {}
        group = chunk.group
        try:
            found = direct_logit_attribution(self.model, group.clean, group.answer, group.wrong)
        except (StageError, ModelError) as reason:
            _log.warning("%s", reason)
            return {REFUSED: np.frombuffer(str(reason).encode(), np.uint8)}
        return {field.name: getattr(found, field.name) for field in fields(DirectLogitAttribution)}

    def _weights(self, units: Units) -> None:
        plan = self.plan
        if plan.composition:
            for kind in KINDS:
                units.do(f"composition/{kind}", lambda kind=kind: {"scores": composition(self._layers, kind).numpy()})
        units.do("eigenvalues", self._eigenvalues)
        for layer in range(plan.info.n_layers if plan.names_task else 0):
            units.do(f"names/{layer}", lambda layer=layer: self._names_at(layer))

    def _names_at(self, layer: int) -> Arrays:
        return {"scores": name_copying(self.model, layer, self._names).cpu().numpy()}

    def _eigenvalues(self) -> Arrays:
        tokens = token_map(self.model, self.config.fold_norms)
        return {
            "ov": np.stack([ov_eigenvalue_copying(weights).cpu().numpy() for weights in self._layers]),
            "full_ov": np.stack(
                [full_ov_eigenvalue_copying(weights, tokens).cpu().numpy() for weights in self._layers]
            ),
        }

    @cached_property
    def _names(self) -> Names:
        """The names of the first pairs of the task that has names."""
        task = self.plan.names_task
        assert task is not None, "asked only where a task has names"
        parts = [
            read_names(self.model, group.clean, torch.from_numpy(np.stack([group.places[p] for p in PLACES], 1)))
            for group in choose_pairs(task.groups, self.config.name_pairs)
        ]
        return Names(torch.cat([part.states for part in parts]), torch.cat([part.tokens for part in parts]))

    @cached_property
    def _layers(self) -> list[HeadWeights]:
        """The weights that scores of weights alone are of."""
        if self.config.fold_norms:
            return [folded_weights(self.model, layer) for layer in range(self.plan.info.n_layers)]
        return [head_weights(self.model, layer) for layer in range(self.plan.info.n_layers)]
