import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mi_pipe.saes import kernels
from mi_pipe.saes.code import SparseCode
from mi_pipe.saes.kernels import decode, products_at, sum_by_feature, top_k_flat, top_k_rows


@settings(max_examples=40, deadline=None)
@given(n_rows=st.integers(1, 6), width=st.integers(1, 700), k=st.integers(1, 12), seed=st.integers(0, 10**6))
def test_row_selection_equals_sorting(n_rows, width, k, seed):
    k = min(k, width)
    pre = torch.randn(n_rows, width, generator=torch.Generator().manual_seed(seed))
    values, columns = top_k_rows(pre, k)
    assert torch.equal(values.sort(1, descending=True).values, pre.sort(1, descending=True).values[:, :k])
    assert torch.equal(pre.gather(1, columns), values)
    assert (columns.diff(dim=1) > 0).all()


@settings(max_examples=40, deadline=None)
@given(
    n_rows=st.integers(1, 40),
    width=st.integers(1, 300),
    share=st.floats(0, 1),
    shift=st.floats(-4, 2),
    seed=st.integers(0, 10**6),
)
def test_flat_selection_equals_sorting(n_rows, width, share, shift, seed):
    pre = torch.randn(n_rows, width, generator=torch.Generator().manual_seed(seed)) + shift
    n_kept = max(1, int(share * pre.numel()))
    positions, values = top_k_flat(pre, n_kept)
    expected = pre.flatten().sort(descending=True).values[:n_kept]
    assert torch.equal(values.sort(descending=True).values, expected[expected > 0])
    assert torch.equal(pre.flatten()[positions], values)


def test_flat_selection_keeps_the_asked_number_among_equal_values():
    positions, values = top_k_flat(torch.ones(20, 30), 7)
    assert positions.tolist() == list(range(7))
    assert values.tolist() == [1.0] * 7


def test_row_selection_works_where_all_values_are_equal():
    values, columns = top_k_rows(torch.zeros(3, 640), 4)
    assert values.abs().sum() == 0
    assert all(len(set(row)) == 4 for row in columns.tolist())


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
    assert code.fired().tolist() == (dense > 0).any(0).tolist()
    torch.testing.assert_close(decode(code, features), dense @ features)
    torch.testing.assert_close(sum_by_feature(code.by_feature(), code.values, rows), dense.T @ rows)
    expected = (rows @ features.T)[dense > 0]
    torch.testing.assert_close(products_at(code, rows, features), expected)
