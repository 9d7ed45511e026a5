"""Control tasks (Hewitt and Liang 2019, arXiv 1909.03368): labels that only memory could know.

Every type (a token, or another column's value) gets one label at random, from the distribution of the real ones over
the training rows. A probe that reads the control task well has learned types by heart; selectivity is the real figure
minus the control's. Where there is one type alone (a position that always holds the same token) there is no control
task.
"""

import numpy as np
from jaxtyping import Int, Shaped

_STREAM = 0xC0417
_FEWEST_TYPES = 2


def control_labels(
    types: Shaped[np.ndarray, " row"],
    training: Shaped[np.ndarray, " training_row"],
    seed: int,
) -> Shaped[np.ndarray, " row"] | None:
    """Return a label for each row's type drawn from the `training` rows' real labels, or None without a control task.

    A function of the set of types, the multiset of training labels and the seed. None too if all types drew one label.
    """
    distinct, codes = np.unique(_as_text(types), return_inverse=True)
    if len(distinct) < _FEWEST_TYPES:
        return None
    generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, _STREAM])))
    drawn = generator.choice(np.sort(training), len(distinct))
    return drawn[codes] if len(np.unique(drawn)) > 1 else None


def n_types(types: Shaped[np.ndarray, " row"]) -> int:
    """Return how many types there are."""
    return len(np.unique(_as_text(types)))


def _as_text(types: Shaped[np.ndarray, " row"]) -> Shaped[np.ndarray, " row"]:
    return types if types.dtype.kind in "iufb" else types.astype(str)


def seen_share(
    training: Int[np.ndarray, " row"] | Shaped[np.ndarray, " row"], test: Shaped[np.ndarray, " row"]
) -> float:
    """Return the share of test rows whose type occurs in training: the others' control labels cannot be known.

    >>> seen_share(np.array([1, 2]), np.array([1, 1, 3, 2]))
    0.75
    """
    return float(np.isin(_as_text(test), _as_text(training)).mean())
