"""What is written of a training beside its weights: rows of tables, and a line for the log."""

import math
from dataclasses import dataclass, field
from typing import Any

import torch

from mi_pipe.saes.evaluation import RowEvaluation

_DENSITY_EDGES = [-5.0 + 0.25 * i for i in range(21)]
"""log10 of the share of rows on which a feature fires."""


@dataclass
class Rows:
    """What is written of a training beside its weights."""

    curve: list[dict[str, Any]] = field(default_factory=list)
    held_out: list[dict[str, Any]] = field(default_factory=list)
    densities: list[dict[str, Any]] = field(default_factory=list)
    timing: list[dict[str, Any]] = field(default_factory=list)

    def add(self, other: "Rows") -> None:
        """Add another's rows."""
        for name, rows in vars(other).items():
            getattr(self, name).extend(rows)


def log_line(label: str, new: list[dict[str, Any]], timing: dict[str, Any], n_steps: int) -> str:
    """Return where a training is, for the log."""
    figures = ", ".join(f"{row['fvu']:.3f} at L0 {row['l0']:.1f}" for row in new)
    step, speed, waiting = timing["step"], timing["tokens_per_s"], timing["waiting_share"]
    return f"{label}: step {step:,} of {n_steps:,}, {speed:,.0f} tokens/s, waiting {waiting:.1%}, FVU {figures}"


def density_histogram(name: str, step: int, found: RowEvaluation) -> list[dict[str, Any]]:
    """Return how many features have which density: lower edges of bins of log10; none for features that never fire."""
    density = found.n_fired.double().cpu() / found.figures.n_rows
    logs = density[density > 0].log10().clamp_min(_DENSITY_EDGES[0])
    counts = torch.histc(logs, bins=len(_DENSITY_EDGES) - 1, min=_DENSITY_EDGES[0], max=_DENSITY_EDGES[-1])
    silent = {"sae": name, "step": step, "log10_density": None, "n_features": int((density == 0).sum())}
    bins = zip(_DENSITY_EDGES, counts.tolist(), strict=False)
    return [silent, *({"sae": name, "step": step, "log10_density": edge, "n_features": int(n)} for edge, n in bins)]


def finite(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row without what is not a finite number: JSON has none, and tables show it as missing."""
    return {key: value for key, value in row.items() if not isinstance(value, float) or math.isfinite(value)}
