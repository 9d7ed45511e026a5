"""Stage `heads`: what every attention head attends to, copies, composes with and writes, and its class.

Units of work are the sequences of one forward pass, single prompts, chunks of pairs, kinds of composition and layers;
their results wait in scratch. The last unit, whether heads steer the attention of name movers, is measured of the
heads that the others make candidates.
"""

import numpy as np
import pandas as pd

from mi_pipe.core.manifest import Scalar
from mi_pipe.core.stage import Estimate, Stage
from mi_pipe.core.workspace import Workspace
from mi_pipe.heads.classes import Thresholds, classify, criteria
from mi_pipe.heads.composition import KINDS
from mi_pipe.heads.evidence import with_columns
from mi_pipe.heads.inhibition import Head
from mi_pipe.models.source import load_source
from stages.heads_files import HeadsFiles, members_of
from stages.heads_plan import HeadsConfig, Inputs, make_plan
from stages.heads_units import Measurements, Units

__all__ = ["STAGE", "HeadsConfig", "Inputs"]
_INHIBITION = "inhibition"
_LOSS = "name_mover_attention_loss"
_HALF_BYTES, _FLOAT_BYTES = 2, 4
_TABLE_BYTES = 200_000


def estimate(config: HeadsConfig, inputs: Inputs) -> Estimate:
    """Return the size of patterns, attention, attribution and composition, and the number of units."""
    plan = make_plan(config, inputs)
    n_heads = plan.info.n_layers * plan.info.n_heads
    size = 0
    for task in plan.tasks:
        longest = max((len(prompt.tokens) for prompt in task.prompts), default=0)
        size += _HALF_BYTES * len(task.prompts) * n_heads * longest**2
        values_a_head = 5 + (len(task.groups[0].places) + 1) ** 2
        size += _FLOAT_BYTES * sum(group.n_pairs for group in task.groups) * n_heads * values_a_head
    size += _FLOAT_BYTES * len(KINDS) * n_heads**2 * plan.composition
    return Estimate(2 * size + _TABLE_BYTES, len(plan.keys), "units")


def run(config: HeadsConfig, inputs: Inputs, work: Workspace) -> dict[str, Scalar]:
    """Measure heads, leaving out what the ledger has, and write the files."""
    plan = make_plan(config, inputs)
    units = Units(work)
    work.ledger.expect(len(plan.keys))
    measure = None
    if any(key not in work.ledger for key in plan.keys):
        measure = Measurements(config, plan, load_source(inputs.model, config.device))
        measure.run(units)
    files = HeadsFiles(config, plan, units, inputs.model.id)
    scores = files.scores()
    evidence = files.evidence(scores)
    if _INHIBITION in plan.keys:
        if measure is not None:
            heads, receivers = _inhibitors(evidence, config.thresholds)
            units.do(_INHIBITION, lambda: measure.inhibition(heads, receivers))
        evidence = with_columns(evidence, {_LOSS: units.read(_INHIBITION)["losses"]})
    return files.write(scores, evidence)


def _inhibitors(evidence: pd.DataFrame, thresholds: Thresholds) -> tuple[list[Head], list[Head]]:
    """Return the heads that attend to the subject's second mention, and the name movers that they may steer."""
    movers = members_of(classify(evidence, criteria(thresholds)), "name_mover")
    receivers: list[Head] = [(int(layer), int(head)) for layer, head in (name.split(".") for name in movers)]
    last = max((layer for layer, _ in receivers), default=-1)
    attends = (evidence["end_to_s2"] >= thresholds.subject) & (evidence["layer"] < last)
    found = evidence.loc[attends, ["layer", "head"]].to_numpy(np.int64)
    return [(int(layer), int(head)) for layer, head in found], receivers


STAGE = Stage(name="heads", version=3, config=HeadsConfig, inputs=Inputs, run=run, estimate=estimate)
