"""Which class each head belongs to, and on what evidence.

A class has two or three criteria, each a column of evidence against a threshold, measured in different ways: on random
tokens and on the task's prompts, by attention and by what is written to the logits. A head is of a class if it meets
all criteria that could be measured, and at least two were; it is a candidate if it misses one.

The words are those of Wang et al. 2022 ("Interpretability in the Wild"): name movers attend from the end to the
indirect object and write its name; negative ones write against it; subject-inhibition heads attend to the subject's
second mention and steer the name movers' attention; subject suppressors attend there and write against that name
themselves (copy suppression, McDougall et al. 2023). Thresholds are conventions, not truths.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float
from pydantic import Field

from mi_pipe.core.config import Config

CLASSES = "classes"
CANDIDATE = "candidate_for"
_MIN_MEASURED = 2


class Thresholds(Config):
    """From which value on evidence speaks for a class."""

    diagonal: float = Field(default=0.4, gt=0, le=1)
    """Attention over a diagonal, and prefix matching, on random tokens."""
    prompts: float = Field(default=0.3, gt=0, le=1)
    """Attention between two places of a task's prompts, or to the token before."""
    subject: float = Field(default=0.2, gt=0, le=1)
    """Attention from the end to the subject's second mention."""
    logit_share: float = Field(default=0.02, gt=0)
    """Share of the mean logit difference that a head writes itself, in absolute value."""
    copying: float = Field(default=0.5, gt=0, le=1)
    """Name copying score, or its negative's."""
    attention_loss: float = Field(default=0.02, gt=0, le=1)
    """By how much name movers' attention to the indirect object falls when a head's output is exchanged."""


@dataclass(frozen=True)
class Criterion:
    """One column of evidence, and from where on (or, negative, down to where) it counts."""

    evidence: str
    threshold: float

    def is_met(self, values: Float[np.ndarray, " head"]) -> Bool[np.ndarray, " head"]:
        """Say for which heads it is met; NaN is not."""
        return values >= self.threshold if self.threshold >= 0 else values <= self.threshold


def criteria(thresholds: Thresholds) -> dict[str, list[Criterion]]:
    """Return the criteria of each class."""
    t = thresholds
    return {
        "previous_token": [Criterion("previous_token", t.diagonal), Criterion("prompts_previous_token", t.prompts)],
        "duplicate_token": [Criterion("duplicate_token", t.diagonal), Criterion("s2_to_s1", t.prompts)],
        "induction": [Criterion("induction", t.diagonal), Criterion("prefix_matching", t.diagonal)],
        "name_mover": [
            Criterion("end_to_io", t.prompts),
            Criterion("logit_share", t.logit_share),
            Criterion("name_copying", t.copying),
        ],
        "negative_name_mover": [
            Criterion("end_to_io", t.prompts),
            Criterion("logit_share", -t.logit_share),
            Criterion("negative_name_copying", t.copying),
        ],
        "subject_inhibition": [
            Criterion("end_to_s2", t.subject),
            Criterion("name_mover_attention_loss", t.attention_loss),
        ],
        "subject_suppressor": [
            Criterion("end_to_s2", t.subject),
            Criterion("logit_share", t.logit_share),
            Criterion("negative_name_copying", t.copying),
        ],
    }


def classify(evidence: pd.DataFrame, found: Mapping[str, list[Criterion]]) -> pd.DataFrame:
    """Return `layer`, `head`, the classes and candidacies (comma-separated), and the columns of evidence used.

    Columns that were not measured are NaN.
    """
    used = list(dict.fromkeys(criterion.evidence for rules in found.values() for criterion in rules))
    table = evidence.reindex(columns=["layer", "head", *used])
    members, candidates = {}, {}
    for name, rules in found.items():
        met = np.stack([rule.is_met(table[rule.evidence].to_numpy(float)) for rule in rules])
        measured = np.stack([table[rule.evidence].notna().to_numpy() for rule in rules])
        is_member = (met | ~measured).all(0) & (measured.sum(0) >= _MIN_MEASURED)
        members[name], candidates[name] = is_member, met.any(0) & ~is_member & _is_near(met)
    table.insert(2, CLASSES, _joined(members, len(table)))
    table.insert(3, CANDIDATE, _joined(candidates, len(table)))
    return table


def criteria_record(found: Mapping[str, list[Criterion]]) -> dict[str, list[dict[str, object]]]:
    """Return the criteria as JSON values."""
    return {name: [asdict(rule) for rule in rules] for name, rules in found.items()}


def _is_near(met: np.ndarray) -> np.ndarray:
    """Of two criteria one, of three two: what a candidate meets at least."""
    return met.sum(0) >= len(met) - 1


def _joined(flags: Mapping[str, np.ndarray], n_rows: int) -> list[str]:
    return [", ".join(name for name, is_so in flags.items() if is_so[row]) for row in range(n_rows)]
