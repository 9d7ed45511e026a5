"""What a patched run is judged by: the logit difference, and how much of it a patch brings back.

Formulas (spec of activation patching as in Wang et al. 2022 and TransformerLens):
logit difference m = logit[answer] - logit[wrong] at the last position;
denoising, recovered fraction = (m_patched - m_corrupted) / (m_clean - m_corrupted): 1 is clean, 0 corrupted;
noising, lost fraction = (m_patched - m_clean) / (m_corrupted - m_clean): 1 is corrupted, 0 clean.
"""

from typing import Literal, TypeVar

import numpy as np
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor

Direction = Literal["denoising", "noising"]
Values = TypeVar("Values", float, np.ndarray, Tensor, xr.DataArray)


def logit_diff(
    last_logits: Float[Tensor, "pair d_vocab"], answer: Int[Tensor, " pair"], wrong: Int[Tensor, " pair"]
) -> Float[Tensor, " pair"]:
    """Return logit[answer] - logit[wrong] of each row of last-position logits."""
    right = last_logits.gather(-1, answer[:, None]).squeeze(-1)
    return right - last_logits.gather(-1, wrong[:, None]).squeeze(-1)


def recovered_fraction(patched: Values, clean: Values, corrupted: Values) -> Values:
    """Return (patched - corrupted) / (clean - corrupted), the part of the clean metric that denoising restores.

    For the figure of a set of pairs give means over pairs: it is the ratio of means, not the mean of ratios.
    Not a number where clean and corrupted are equal.

    >>> recovered_fraction(1.0, clean=3.0, corrupted=-1.0)
    0.5
    """
    return (patched - corrupted) / (clean - corrupted)


def lost_fraction(patched: Values, clean: Values, corrupted: Values) -> Values:
    """Return (patched - clean) / (corrupted - clean), the part of the clean metric that noising destroys.

    >>> lost_fraction(2.0, clean=3.0, corrupted=-1.0)
    0.25
    """
    return (patched - clean) / (corrupted - clean)


def effect_fraction(patched: Values, clean: Values, corrupted: Values, direction: Direction) -> Values:
    """Return the fraction that belongs to the direction: recovered when denoising, lost when noising."""
    if direction == "denoising":
        return recovered_fraction(patched, clean, corrupted)
    return lost_fraction(patched, clean, corrupted)
