"""The page of SAEs: what held-out rows and prompts say, the trade of sparsity against quality, and how training went.

SAEs that were imported have no curves, and no figures of the evaluation if they were not measured; sets of older
versions lack what was not kept then.
"""

from collections.abc import Mapping, Sequence

import pandas as pd

from mi_pipe.core.artifact import Artifact
from mi_pipe.report.figures import Figure
from mi_pipe.report.frontier import families, frontiers
from mi_pipe.report.naming import sae_title
from mi_pipe.report.page import Page
from mi_pipe.report.sae_curves import HELD_OUT, LOSS, OPTIMISATION, QUALITY, curves, densities

_TABLES = ("training", "evaluation", "held_out", "densities")
_MANY = 1


def page(sets: Sequence[Artifact]) -> Page:
    """Make the page of one or more sets of SAEs."""
    tables = {name: _joined(sets, f"{name}.parquet") for name in _TABLES}
    training = tables["training"]
    figures = _figures(tables, families(sets))
    return Page(
        context={
            "groups": {title: [figure.name for figure in group] for title, group in figures.items() if group},
            "evaluation": tables["evaluation"],
            "n_tokens": int(training["tokens"].to_numpy().max()) if len(training) else None,
        },
        figures=[figure for group in figures.values() for figure in group],
        tables={name: table for name, table in tables.items() if len(table.columns)},
    )


def _figures(tables: Mapping[str, pd.DataFrame], family: Mapping[str, str]) -> dict[str, list[Figure]]:
    """Return the figures under the title of the part of the page where they stand."""
    training = tables["training"]
    held_out = [*curves(tables["held_out"], HELD_OUT, family, "held-out-"), *densities(tables["densities"], family)]
    return {
        "Evaluation": frontiers(tables["evaluation"], family),
        "On held-out rows during training": held_out,
        "Training": curves(training, QUALITY, family),
        "Loss": curves(training, LOSS, family),
        "Optimisation": curves(training, OPTIMISATION, family),
    }


def _joined(sets: Sequence[Artifact], name: str) -> pd.DataFrame:
    """Return the tables of all sets that have one after one another; the set's label leads where there are several."""
    found = [(artifact, artifact.read_table(name)) for artifact in sets if name in artifact.manifest.files]
    frames = [frame for _, frame in found]
    if len(sets) > _MANY:
        frames = [
            frame.assign(sae=[sae_title(artifact, str(sae), len(sets)) for sae in frame["sae"]])
            for artifact, frame in found
        ]
    return pd.concat([frame for frame in frames if len(frame)] or frames[:1] or [pd.DataFrame()], ignore_index=True)
