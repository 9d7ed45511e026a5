"""The products of a sparse training step; none makes a dense (batch, d_sae) gradient.

Only the encoder's product is dense: 2 * batch * d_in * d_sae operations. Selection reads the
pre-activations once; decoding and the gradients cost entries * d_in each, where entries = batch * k. Sums
over entries run through `embedding_bag`, which on CPU is three times as fast as a CSR product; the products
at single entries run through `sampled_addmm` (or a chunked gather where that does not exist).

Extra memory beyond the pre-activations: a few arrays of `entries` numbers, and (batch, d_in) twice.
"""

import functools
import warnings
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from mi_pipe.models.device import multiplies_bfloat16
from mi_pipe.saes.code import FeatureOrder, SparseCode

Precision = Literal["float32", "bfloat16"]

_PREFILTER_WIDTH = 16
_LARGEST_CHUNK = 6
_GATHER_ENTRIES = 1 << 15


def pick_precision(device: torch.device) -> Precision:
    """Return bfloat16 where the device has instructions for its products, else float32."""
    return "bfloat16" if multiplies_bfloat16(device) else "float32"


def pre_activations(
    x: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "d_sae d_in"],  # noqa: N803 (the field's names)
    b_enc: Float[Tensor, " d_sae"],
    precision: Precision,
    out: Float[Tensor, "batch d_sae"] | None = None,
) -> Float[Tensor, "batch d_sae"]:
    """Return x W_encᵀ + b_enc in the dtype of `x`; `bfloat16` rounds the factors and the product to it."""
    if precision == "bfloat16":
        product = x.to(torch.bfloat16) @ W_enc.to(torch.bfloat16).T
        return product.to(x.dtype).add_(b_enc)
    return torch.addmm(b_enc, x, W_enc.T, out=out)


def top_k_rows(pre: Float[Tensor, "batch d_sae"], k: int) -> tuple[Float[Tensor, "batch k"], Int[Tensor, "batch k"]]:
    """Return the k largest values of each row and their columns, in the order of columns.

    Exact; equal values may be told apart differently than by `topk`.
    """
    columns = _top_k_columns(pre, k).sort(dim=1).values
    return pre.gather(1, columns), columns


def _top_k_columns(pre: Float[Tensor, "batch column"], k: int) -> Int[Tensor, "batch k"]:
    """Return the columns of the k largest values of each row, in any order.

    Wide rows are cut into small chunks: the k largest values lie in the k chunks with the largest maxima (found
    the same way), so only those are looked at again.
    """
    n_rows, n_columns = pre.shape
    chunk = _chunk_of(n_columns) if pre.device.type == "cpu" and n_columns >= _PREFILTER_WIDTH * k else 1
    if chunk == 1:
        return pre.topk(k, dim=1, sorted=False).indices
    n_chunks = n_columns // chunk
    chunks = _top_k_columns(pre.view(n_rows, chunk, n_chunks).amax(1), k)
    steps = torch.arange(chunk, device=pre.device) * n_chunks
    candidates = (chunks[:, None, :] + steps[:, None]).view(n_rows, -1)
    places = pre.gather(1, candidates).topk(k, dim=1, sorted=False).indices
    return candidates.gather(1, places)


def _chunk_of(n_columns: int) -> int:
    """Return the largest size of at most 6 into which the columns divide."""
    return next(size for size in range(_LARGEST_CHUNK, 0, -1) if n_columns % size == 0)


def top_k_flat(pre: Float[Tensor, "batch d_sae"], n_kept: int) -> tuple[Int[Tensor, " entry"], Float[Tensor, " entry"]]:
    """Return flat positions (int64, ascending) and values of the `n_kept` largest values of a matrix, of those above 0.

    A sample of the matrix gives a bound that a few more than `n_kept` values pass; only those are sorted. Exact; of
    equal values at the edge the first are kept.
    """
    flat = pre.reshape(-1)
    bound = _lower_bound(flat, n_kept)
    positions = (flat > bound).nonzero().squeeze(1)
    values = flat[positions]
    if values.shape[0] < n_kept and bound > 0:
        positions = (flat > 0).nonzero().squeeze(1)
        values = flat[positions]
    if values.shape[0] <= n_kept:
        return positions, values
    edge = values.topk(n_kept, sorted=False).values.min()
    keep = values > edge
    ties = (values == edge).nonzero().squeeze(1)
    keep[ties[: n_kept - int(keep.sum())]] = True
    return positions[keep], values[keep]


def _lower_bound(flat: Float[Tensor, " value"], n_kept: int) -> float:
    """Return a value, at least 0, that probably somewhat more than `n_kept` entries exceed."""
    stride = 61
    sample = flat[::stride]
    rank = int(1.1 * n_kept / stride + 4 * (n_kept / stride) ** 0.5) + 4
    if rank >= sample.shape[0]:
        return 0.0
    return max(0.0, float(sample.topk(rank, sorted=False).values.min()))


def decode(code: SparseCode, W_dec: Float[Tensor, "d_sae d_in"]) -> Float[Tensor, "batch d_in"]:  # noqa: N803
    """Return Σ_j z_j W_dec,j for each row, without bias."""
    return functional.embedding_bag(
        code.features,
        W_dec,
        code.row_starts,
        mode="sum",
        per_sample_weights=code.values,
        include_last_offset=True,
    )


def sum_by_feature(
    order: FeatureOrder, weights: Float[Tensor, " entry"], rows: Float[Tensor, "batch d_in"]
) -> Float[Tensor, "d_sae d_in"]:
    """Return for each feature the sum over its entries of the entry's weight times the entry's row."""
    return functional.embedding_bag(
        order.rows,
        rows,
        order.feature_starts,
        mode="sum",
        per_sample_weights=weights[order.order],
        include_last_offset=True,
    )


def products_at(
    code: SparseCode, rows: Float[Tensor, "batch d_in"], features: Float[Tensor, "d_sae d_in"]
) -> Float[Tensor, " entry"]:
    """Return rows[b] · features[j] at each entry (b, j) of the code."""
    if rows.device.type == "cuda" or (rows.device.type == "cpu" and torch.backends.mkl.is_available()):
        _hush_beta_warning()
        pattern = torch.sparse_csr_tensor(
            code.row_starts,
            code.features,
            torch.zeros_like(code.values),
            (code.n_rows, code.d_sae),
            check_invariants=False,
        )
        return torch.sparse.sampled_addmm(pattern, rows, features.T, beta=0.0).values()
    out = torch.empty_like(code.values)
    entry_rows = code.entry_rows()
    for start in range(0, out.shape[0], _GATHER_ENTRIES):
        part = slice(start, start + _GATHER_ENTRIES)
        out[part] = torch.linalg.vecdot(rows[entry_rows[part]], features[code.features[part]])
    return out


@functools.cache
def _hush_beta_warning() -> None:
    """Spend torch's once-a-process warning that CSR tensors are in beta, unseen."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        torch.sparse_csr_tensor([0, 0], [], [], (1, 1))
