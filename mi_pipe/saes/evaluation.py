"""How well an SAE does on activations it was not trained on: figures over a set of rows.

With x what is to be reconstructed (for a transcoder its output's activations) and x̂ the reconstruction: FVU and L0 as
in `metrics`; cosine, the mean over rows of cos(x, x̂); relative_bias, Σ‖x̂‖² / Σ x̂·x (Rajamanoharan et al. 2024, Gated
SAEs, equation 10: 1 without shrinkage); l2_ratio, the mean of ‖x̂‖ / ‖x‖; mse, Σ‖x - x̂‖² / (rows * d); silent_fraction
and dense_fraction, the shares of features that fire on none and on more than a tenth of the rows.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from mi_pipe.saes.kernels import decode
from mi_pipe.saes.metrics import StreamingFVU, wide_dtype
from mi_pipe.saes.sae import SAE
from mi_pipe.saes.step import Batch, chunks_of

_DENSE_SHARE = 0.1
_TOTALS: tuple[str, ...] = ("cosine", "square", "inner", "ratio", "error")


@dataclass(frozen=True)
class RowFigures:
    """Metrics over a set of rows."""

    n_rows: int
    fvu: float
    l0: float
    cosine: float
    relative_bias: float
    l2_ratio: float
    mse: float
    silent_fraction: float
    dense_fraction: float


@dataclass(frozen=True)
class RowEvaluation:
    """Metrics over a set of rows, and on how many of them each feature fires (int64)."""

    figures: RowFigures
    n_fired: Int[Tensor, " d_sae"]


@torch.no_grad()
def evaluate_rows(sae: SAE, batches: Iterable[Batch]) -> RowEvaluation:
    """Return metrics over raw activations; raises ValueError if there are none."""
    sums = _Sums(sae)
    for batch in batches:
        for rows in chunks_of(batch.x.shape[0], sae.d_sae):
            sums.add(sae, batch.x[rows].to(sae.device), batch.target[rows].to(sae.device))
    return sums.evaluation()


class _Sums:
    """Running sums of the metrics, in wide precision."""

    def __init__(self, sae: SAE) -> None:
        self._fvu = StreamingFVU(sae.d_out, sae.device)
        self._n_fired = torch.zeros(sae.d_sae, dtype=torch.int64, device=sae.device)
        self._totals = dict.fromkeys(_TOTALS, 0.0)
        self._n_rows = 0
        self._width = sae.d_out

    def add(self, sae: SAE, x: Float[Tensor, "batch d_in"], target: Float[Tensor, "batch d_out"]) -> None:
        code = sae.encode_sparse(x)
        reconstruction = sae.with_skip(decode(code, sae.W_dec) + sae.b_dec, x)
        self._fvu.update(target, reconstruction)
        self._n_fired += torch.bincount(code.features[code.values > 0], minlength=sae.d_sae)
        wide, made = (value.to(wide_dtype(x.device)) for value in (target, reconstruction))
        norms = torch.linalg.vector_norm(wide, dim=1), torch.linalg.vector_norm(made, dim=1)
        found = {
            "cosine": functional.cosine_similarity(wide, made, dim=-1).sum(),
            "square": norms[1].square().sum(),
            "inner": (wide * made).sum(),
            "ratio": (norms[1] / norms[0].clamp_min(torch.finfo(wide.dtype).tiny)).sum(),
            "error": (wide - made).square().sum(),
        }
        self._totals = {name: self._totals[name] + float(value) for name, value in found.items()}
        self._n_rows += x.shape[0]

    def evaluation(self) -> RowEvaluation:
        n, totals = self._n_rows, self._totals
        if not n:
            raise ValueError("an SAE cannot be evaluated on no rows")
        figures = RowFigures(
            n_rows=n,
            fvu=self._fvu.value(),
            l0=int(self._n_fired.sum()) / n,
            cosine=totals["cosine"] / n,
            relative_bias=totals["square"] / totals["inner"] if totals["inner"] else float("nan"),
            l2_ratio=totals["ratio"] / n,
            mse=totals["error"] / (n * self._width),
            silent_fraction=float((self._n_fired == 0).double().mean()),
            dense_fraction=float((self._n_fired > _DENSE_SHARE * n).double().mean()),
        )
        return RowEvaluation(figures, self._n_fired)
