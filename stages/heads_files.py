"""From finished units of the stage `heads` to its files and main figures."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from functools import cached_property

import numpy as np
import pandas as pd
import xarray as xr

from mi_pipe.attention.diagonals import DIAGONAL_SCORES, score_table
from mi_pipe.attention.head_scores import (
    ATTENTION_FOLDER,
    ATTRIBUTION_FOLDER,
    CLASSES_FILE,
    COMPOSITION_FOLDER,
    CRITERIA_FILE,
    LOSS_FILE,
    PATTERNS_FOLDER,
    SCORES_FILE,
)
from mi_pipe.attention.pattern_store import write_patterns
from mi_pipe.core.manifest import Scalar
from mi_pipe.core.workspace import Workspace
from mi_pipe.heads import name_copying, random_sequences
from mi_pipe.heads.classes import CLASSES, classify, criteria, criteria_record
from mi_pipe.heads.composition import KINDS, random_baseline
from mi_pipe.heads.direct_logit_attribution import DirectLogitAttribution
from mi_pipe.heads.evidence import logit_share, place_evidence, prompts_evidence, with_columns
from mi_pipe.heads.prompt_attention import HABITS, named_positions
from mi_pipe.models.info import ModelInfo
from stages.heads_plan import HeadsConfig, HeadsPlan, TaskPlan, batch_key
from stages.heads_units import REFUSED, Units

_PLACES = ("from", "to")
_BY_PART = {"heads": ("layer", "head"), "attn_bias": ("layer",), "mlps": ("layer",)}
_NUMBERED = ("layer", "head", "later_layer", "later_head")
_DTYPE = np.float32


class HeadsFiles:
    """Writes the files of one artifact."""

    def __init__(self, config: HeadsConfig, plan: HeadsPlan, units: Units, model_id: str) -> None:
        """Take finished units."""
        self.config, self.plan, self.units, self.model_id = config, plan, units, model_id
        self.work: Workspace = units.work

    def scores(self) -> pd.DataFrame:
        """Return the table of scores: one row a head."""
        repeated = self._join([batch_key("repeated", batch) for batch in self.plan.repeated], "scores").mean(0)
        columns: dict[str, np.ndarray] = {}
        if self.plan.knows_weights:
            found = self._join([batch_key("random", batch) for batch in self.plan.random], "scores").mean(0)
            columns |= {name: found[..., i] for i, name in enumerate(random_sequences.SCORES)}
            values = self.units.read("eigenvalues")
            columns |= {f"{name}_eigenvalue_copying": values[name] for name in ("ov", "full_ov")}
        if self.plan.knows_weights and self.plan.names_task is not None:
            keys = [f"names/{layer}" for layer in range(self.plan.info.n_layers)]
            copied = np.stack([self.units.read(key)["scores"] for key in keys], 1)
            columns |= {name: copied[i] for i, name in enumerate(name_copying.SCORES)}
        return with_columns(score_table(repeated), columns)

    def evidence(self, scores: pd.DataFrame) -> pd.DataFrame:
        """Return the scores and what the tasks' prompts say of each head."""
        habits = [self._chunks(task, "habits") for task in self.plan.tasks]
        columns = prompts_evidence(habits)
        task = self.plan.names_task
        if task is not None:
            columns |= place_evidence(self._chunks(task, "places"), list(_places(task)))
            if self._is_attributed(task):
                columns["logit_share"] = logit_share(self._chunks(task, "heads"), self._chunks(task, "logit_diff"))
        return with_columns(scores, columns)

    def write(self, scores: pd.DataFrame, evidence: pd.DataFrame) -> dict[str, Scalar]:
        """Write all files and return the main figures."""
        for task in self.plan.tasks:
            self._write_patterns(task)
            self._write_attention(task)
            if self._is_attributed(task):
                self._write_attribution(task)
        if self.plan.knows_weights and self.plan.composition:
            self._write_composition()
        self.work.write_table(SCORES_FILE, scores)
        return self._write_loss() | _strongest(scores) | self._write_classes(evidence)

    def _write_classes(self, evidence: pd.DataFrame) -> dict[str, Scalar]:
        rules = criteria(self.config.thresholds)
        table = classify(evidence, rules)
        task = self.plan.names_task
        reasons = self.plan.refused | {f"attribution of {name}": reason for name, reason in self._refusals.items()}
        record = {"criteria": criteria_record(rules), "task": task.name if task else None, "refused": reasons}
        self.work.write_table(CLASSES_FILE, table)
        self.work.write_json(CRITERIA_FILE, record)
        return {f"{name}_heads": ", ".join(members_of(table, name)) for name in rules}

    def _write_loss(self) -> dict[str, Scalar]:
        keys = [batch_key("repeated", batch) for batch in self.plan.repeated]
        first, second = (float(loss) for loss in self._join(keys, "losses").mean(axis=0))
        measured = {"n_sequences": self.config.n_sequences, "period": self.plan.period}
        self.work.write_json(LOSS_FILE, {"first_half": first, "second_half": second, **measured})
        return {"first_half_loss": first, "second_half_loss": second, "period": self.plan.period}

    def _write_patterns(self, task: TaskPlan) -> None:
        info: ModelInfo = self.plan.info
        if task.prompts:
            write_patterns(
                self.work.path(f"{PATTERNS_FOLDER}/{task.name}.zarr"),
                [prompt.index for prompt in task.prompts],
                [prompt.tokens for prompt in task.prompts],
                (self.units.read(prompt.key)["pattern"] for prompt in task.prompts),
                (info.n_layers, info.n_heads),
                {"task": task.name, "model": self.model_id, "labels": [prompt.labels for prompt in task.prompts]},
            )

    def _write_attention(self, task: TaskPlan) -> None:
        names = list(_places(task))
        arrays = {
            "habits": (("pair", "layer", "head", "habit"), self._chunks(task, "habits")),
            "places": (("pair", "layer", "head", *_PLACES), self._chunks(task, "places")),
        }
        if not names:
            del arrays["places"]
        labels = {"habit": list(HABITS), "place": names, "run": "clean"}
        self._write(f"{ATTENTION_FOLDER}/{task.name}.zarr", arrays, task, labels)

    def _write_attribution(self, task: TaskPlan) -> None:
        parts = [field.name for field in fields(DirectLogitAttribution)]
        arrays = {part: (("pair", *_BY_PART.get(part, ())), self._chunks(task, part)) for part in parts}
        how = {
            "metric": "logit_diff",
            "position": "last",
            "run": "clean",
            "final_norm": "its scale in this run",
            "aggregation": "none",
        }
        self._write(f"{ATTRIBUTION_FOLDER}/{task.name}.zarr", arrays, task, how)

    def _write_composition(self) -> None:
        info = self.plan.info
        dims = ("layer", "head", "later_layer", "later_head")
        arrays = {kind: (dims, self.units.read(f"composition/{kind}")["scores"]) for kind in KINDS}
        how: dict[str, object] = {"fold_norms": self.config.fold_norms, "formula": "|A B|_F / (|A|_F |B|_F)"}
        if self.config.baseline_draws:
            sizes = (info.d_model, info.d_head)
            mean, deviation = random_baseline(*sizes, self.config.baseline_draws, self.config.seed)
            how |= {"random_mean": mean, "random_std": deviation, "random_draws": self.config.baseline_draws}
        self._write(COMPOSITION_FOLDER, arrays, None, how)

    def _write(
        self,
        name: str,
        arrays: Mapping[str, tuple[tuple[str, ...], np.ndarray]],
        task: TaskPlan | None,
        attributes: Mapping[str, object],
    ) -> None:
        found = {key: (dims, values.astype(_DTYPE)) for key, (dims, values) in arrays.items()}
        coords: dict[str, np.ndarray] = {}
        attributes = {**attributes, "model": self.model_id, "dtype": "float32"}
        attributes |= {"task": task.name} if task else {}
        if task is not None:
            coords["pair"] = np.concatenate([chunk.group.pairs for chunk in task.chunks])
        dataset = xr.Dataset(found, coords=coords, attrs=attributes)
        numbers = {axis: np.arange(size) for axis, size in dataset.sizes.items() if axis in _NUMBERED}
        dataset.assign_coords(numbers).to_zarr(self.work.path(name), mode="w", zarr_format=3, consolidated=False)

    def _is_attributed(self, task: TaskPlan) -> bool:
        return not self.plan.refused and task.name not in self._refusals

    @cached_property
    def _refusals(self) -> dict[str, str]:
        """Why a task has no attribution: its components did not sum to the logits in some chunk of pairs."""
        found: dict[str, str] = {}
        for task in self.plan.tasks:
            units = (self.units.read(task.key(chunk)) for chunk in task.chunks)
            reason = next((unit[REFUSED] for unit in units if REFUSED in unit), None)
            found |= {} if reason is None else {task.name: bytes(reason).decode()}
        return found

    def _chunks(self, task: TaskPlan, name: str) -> np.ndarray:
        return self._join([task.key(chunk) for chunk in task.chunks], name)

    def _join(self, keys: Sequence[str], name: str) -> np.ndarray:
        return np.concatenate([self.units.read(key)[name] for key in keys])


def members_of(classes: pd.DataFrame, name: str) -> list[str]:
    """Return the heads of a class, as "18.6"."""
    is_member = [name in found for found in classes[CLASSES].str.split(", ")]
    return [f"{layer}.{head}" for layer, head in classes.loc[is_member, ["layer", "head"]].to_numpy()]


def _places(task: TaskPlan) -> dict[str, np.ndarray]:
    return named_positions(task.groups[0].places, task.groups[0].n_pos)


def _strongest(scores: pd.DataFrame) -> dict[str, Scalar]:
    figures: dict[str, Scalar] = {}
    names = [*DIAGONAL_SCORES, *(name for name in random_sequences.SCORES if name in scores)]
    for name in names:
        best = scores.loc[scores[name].idxmax()]
        figures |= {f"{name}_head": f"{int(best['layer'])}.{int(best['head'])}", f"{name}_score": float(best[name])}
    return figures
