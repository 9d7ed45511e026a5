"""Position classes: named places of a task's prompts (for IOI io, s1, s2, end), and what lies beside them (s1+1)."""

import re
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Int

from mi_pipe.core.errors import ConfigError, near_names
from mi_pipe.prompts.prompt_set import PairGroup

NO_PLACE = -1
END = "end"
_NAME = re.compile(r"([a-z_][a-z0-9_]*)\s*(?:([+-])\s*(\d+))?")


def place_positions(
    places: Mapping[str, Int[np.ndarray, " pair"]], n_pos: Int[np.ndarray, " pair"], name: str
) -> Int[np.ndarray, " pair"]:
    """Return each pair's position of a place, -1 where it has none; `end` is always the last.

    Raises ConfigError for a place that the prompts do not have.
    """
    found = _NAME.fullmatch(name.strip().lower())
    known = {END: n_pos - 1, **places}
    if found is None or found[1] not in known:
        near = near_names(name, list(known))
        raise ConfigError(f"The prompts have no position {name!r}.{near} They have {', '.join(known)}; +1 is the next.")
    base = np.asarray(known[found[1]])
    shifted = base + int(found[3] or 0) * (-1 if found[2] == "-" else 1)
    return np.where((base >= 0) & (shifted >= 0) & (shifted < n_pos), shifted, NO_PLACE)


def places_mask(group: PairGroup, names: Sequence[str]) -> Bool[np.ndarray, "pair pos"]:
    """Return which positions of each pair are one of these places."""
    n_pos = np.full(group.n_pairs, group.n_pos)
    mask = np.zeros((group.n_pairs, group.n_pos), bool)
    for name in names:
        positions = place_positions(group.places, n_pos, name)
        rows = np.flatnonzero(positions != NO_PLACE)
        mask[rows, positions[rows]] = True
    return mask
