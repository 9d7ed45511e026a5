"""The Hilbert-Schmidt independence criterion of linear kernels, from sums over rows; and CKA, its normalised form.

With X and Y centred over n rows, K = XXᵀ and L = YYᵀ,

    tr(KL) = ‖XᵀY‖²_F,      CKA = ‖XᵀY‖² / (‖XᵀX‖ ‖YᵀY‖)                        (Kornblith et al. 2019, equation 4)

which needs no n by n matrix. This is biased: of independent X and Y it is not 0 but grows with the widths over n. The
unbiased estimator of Song et al. (2012, equation 5), used for CKA by Nguyen et al. (2021, equation 3), leaves the
diagonals of K and L out; on centred rows it is, times n (n - 3),

    ‖XᵀY‖² - n / (n - 2) Σ_i ‖x_i‖² ‖y_i‖² + Σ_i ‖x_i‖² Σ_i ‖y_i‖² / ((n - 1)(n - 2)).

It is 0 on average for independent rows (it can be a little below), whatever the widths, and still 1 of X with itself.
If rows of Y are permuted at random, the mean of the biased tr(KL) over all permutations is Σ‖x_i‖² Σ‖y_i‖² / (n - 1).
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

FEWEST_ROWS = 4
"""n (n - 3) has to be positive."""


@dataclass(frozen=True)
class ProductSums:
    """Sums over n centred rows for each pair of sites; float64, symmetric, NaN for pairs that were not computed."""

    n_rows: int
    cross: Float[np.ndarray, "site site"]
    """‖XᵀY‖²_F."""
    norms: Float[np.ndarray, "site site"]
    """Σ_i ‖x_i‖² ‖y_i‖²."""
    squares: Float[np.ndarray, " site"]
    """Σ_i ‖x_i‖²."""

    def biased(self) -> Float[np.ndarray, "site site"]:
        """Return CKA by the biased estimator."""
        return normalised(self.cross, self.cross)

    def debiased(self) -> Float[np.ndarray, "site site"]:
        """Return CKA by the unbiased estimator of HSIC; needs FEWEST_ROWS rows."""
        n = self.n_rows
        both = np.outer(self.squares, self.squares)
        hsic = self.cross - n / (n - 2) * self.norms + both / ((n - 1) * (n - 2))
        return normalised(hsic, hsic)

    def chance(self) -> Float[np.ndarray, "site site"]:
        """Return the mean of biased CKA over all permutations of the rows of one side."""
        return normalised(np.outer(self.squares, self.squares) / (self.n_rows - 1), self.cross)

    def effective_rows(self) -> Float[np.ndarray, " site"]:
        """Return (Σ‖x_i‖²)² / Σ‖x_i‖⁴: n if all rows are equally far from the mean, 1 if one row is all there is."""
        fourth = np.diag(self.norms)
        return self.squares**2 / np.where(fourth > 0, fourth, np.nan)


def normalised(
    values: Float[np.ndarray, "site site"], scale: Float[np.ndarray, "site site"]
) -> Float[np.ndarray, "site site"]:
    """Divide by the root of the products of `scale`'s diagonal; NaN where that is not positive (constant rows)."""
    diagonal = np.where(np.diag(scale) > 0, np.diag(scale), np.nan)
    return values / np.sqrt(np.outer(diagonal, diagonal))
