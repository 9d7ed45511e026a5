"""What a person reads of trained SAEs when they are done: held-out figures, a line each."""

import math
from typing import Any

from mi_pipe.saes.sae_set import SAESet

_MOST = 24
_FIGURES = {
    "fvu": ("FVU", ".3f"),
    "l0": ("L0", ".1f"),
    "dead_fraction": ("dead", ".1%"),
    "ce_recovered": ("CE recovered", ".3f"),
    "kl": ("KL", ".3f"),
}


def sae_lines(saes: SAESet) -> list[str]:
    """Return one line an SAE, the first ones of large sweeps.

    >>> _line({"sae": "a", "fvu": 0.25, "l0": 32.0, "dead_fraction": 0.0, "kl": math.nan}, width=3)
    'a    FVU 0.250  L0 32.0  dead 0.0%'
    """
    rows = [{str(key): value for key, value in row.items()} for row in saes.evaluation.head(_MOST).to_dict("records")]
    width = max((len(row["sae"]) for row in rows), default=0)
    more = [f"and {len(saes) - _MOST} more in {saes.id}"] if len(saes) > _MOST else []
    return [*(_line(row, width) for row in rows), *more]


def _line(row: dict[str, Any], width: int) -> str:
    known = {name: row[name] for name in _FIGURES if name in row and not math.isnan(row[name])}
    shown = (f"{_FIGURES[name][0]} {value:{_FIGURES[name][1]}}" for name, value in known.items())
    return f"{row['sae']:<{width}}  {'  '.join(shown)}".rstrip()
