"""Runs the Triton kernels in Triton's interpreter on the CPU and compares them with dense products: a script."""

import sys

import torch

from mi_pipe.saes.code import SparseCode
from mi_pipe.saes.triton_kernels import entry_products, weighted_sums


def code_of(n_rows: int, d_sae: int, share: float, dtype: torch.dtype) -> tuple[SparseCode, torch.Tensor]:
    """A code with empty rows, rows of many entries and a feature in all other rows."""
    dense = torch.randn(n_rows, d_sae).relu() * (torch.rand(n_rows, d_sae) < share)
    dense[:, 3] = 1.5
    dense[1] = 0
    dense[2] = 2.0
    return SparseCode.above(dense.to(dtype), 0.0), dense.to(dtype)


def check(n_rows: int, d_sae: int, width: int, share: float, dtype: torch.dtype) -> None:
    """Compare all three products; sums are in float32 whatever the dtype."""
    code, dense = code_of(n_rows, d_sae, share, dtype)
    rows, features = torch.randn(n_rows, width).to(dtype), torch.randn(d_sae, width).to(dtype)
    order, entry_rows = code.by_feature(), code.entry_rows()
    close = {"rtol": 1e-5, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-1}
    wide = dense.float()
    decoded = weighted_sums(code.row_starts, code.features, code.values, features)
    torch.testing.assert_close(decoded.float(), wide @ features.float(), **close)
    summed = weighted_sums(order.feature_starts, order.rows, code.values[order.order], rows)
    torch.testing.assert_close(summed.float(), wide.T @ rows.float(), **close)
    products = entry_products(rows, features, entry_rows, code.features)
    torch.testing.assert_close(products.float(), (rows.float() @ features.float().T)[wide > 0], **close)
    assert decoded.dtype == summed.dtype == products.dtype == dtype
    again = weighted_sums(code.row_starts, code.features, code.values, features)
    assert torch.equal(decoded, again)


def main() -> None:
    """Check odd sizes, several column blocks, and codes without entries."""
    torch.manual_seed(0)
    check(5, 12, 7, 0.2, torch.float32)
    check(9, 40, 300, 0.1, torch.float32)
    check(4, 6, 64, 0.5, torch.float16)
    none = torch.zeros(0, dtype=torch.int32)
    empty = weighted_sums(torch.zeros(4, dtype=torch.int32), none, torch.zeros(0), torch.randn(2, 5))
    assert torch.equal(empty, torch.zeros(3, 5))
    assert entry_products(torch.randn(2, 3), torch.randn(4, 3), none, none).shape == (0,)
    sys.stdout.write("equal\n")


if __name__ == "__main__":
    main()
