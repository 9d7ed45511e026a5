"""The products of a sparse training step; none makes a dense (batch, d_sae) gradient.

Only the encoder's product is dense: 2 * batch * d_in * d_sae operations. Decoding and the gradients cost
entries * d_in each, where entries = batch * k. On the CPU, sums over entries run through `embedding_bag`, which is
three times as fast as a CSR product; the products at single entries run through `sampled_addmm` (or a chunked gather
where that does not exist). On a GPU both are Triton kernels where triton is installed, and else the same as here.

Extra memory beyond the pre-activations: a few arrays of `entries` numbers, and (batch, d_in) twice.
"""

import functools
import importlib
import importlib.util
import warnings
from types import ModuleType
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from mi_pipe.models.device import multiplies_bfloat16
from mi_pipe.saes.code import FeatureOrder, SparseCode

Precision = Literal["float32", "bfloat16"]

_GATHER_ENTRIES = 1 << 15
_GPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def pick_precision(device: torch.device) -> Precision:
    """Return bfloat16 where the device has instructions for its products, else float32."""
    return "bfloat16" if multiplies_bfloat16(device) else "float32"


def gpu_kernels(table: Tensor) -> ModuleType | None:
    """Return `triton_kernels` where they can work on a tensor: on a GPU, in float32 or narrower, with triton."""
    return _triton_kernels() if table.device.type == "cuda" and table.dtype in _GPU_DTYPES else None


@functools.cache
def _triton_kernels() -> ModuleType | None:
    if importlib.util.find_spec("triton") is None:
        return None
    return importlib.import_module("mi_pipe.saes.triton_kernels")


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


def decode(code: SparseCode, W_dec: Float[Tensor, "d_sae d_in"]) -> Float[Tensor, "batch d_in"]:  # noqa: N803
    """Return Σ_j z_j W_dec,j for each row, without bias."""
    if gpu := gpu_kernels(W_dec):
        return gpu.weighted_sums(code.row_starts, code.features, code.values, W_dec)
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
    if gpu := gpu_kernels(rows):
        return gpu.weighted_sums(order.feature_starts, order.rows, weights[order.order], rows)
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
    if gpu := gpu_kernels(rows):
        return gpu.entry_products(rows, features, code.entry_rows(), code.features)
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
