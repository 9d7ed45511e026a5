import pytest
import torch

from mi_pipe.saes import kernels
from mi_pipe.saes.code import SparseCode
from mi_pipe.saes.kernels import decode, products_at, sum_by_feature


@pytest.mark.parametrize("has_mkl", [True, False])
def test_sparse_products_equal_dense_ones(has_mkl, monkeypatch):
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: has_mkl)
    monkeypatch.setattr(kernels, "_GATHER_ENTRIES", 7)
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(9, 20, generator=generator, dtype=torch.float64).relu()
    dense[3] = 0
    starts = torch.cat([torch.zeros(1), (dense > 0).sum(1).cumsum(0)]).to(torch.int32)
    entries = dense.nonzero()
    code = SparseCode(starts, entries[:, 1].to(torch.int32), dense[dense > 0], 20)
    rows = torch.randn(9, 5, generator=generator, dtype=torch.float64)
    features = torch.randn(20, 5, generator=generator, dtype=torch.float64)
    assert torch.equal(code.dense(), dense)
    assert code.n_fired().tolist() == (dense > 0).sum(0).tolist()
    torch.testing.assert_close(decode(code, features), dense @ features)
    torch.testing.assert_close(sum_by_feature(code.by_feature(), code.values, rows), dense.T @ rows)
    expected = (rows @ features.T)[dense > 0]
    torch.testing.assert_close(products_at(code, rows, features), expected)
