"""Selections are held against sorting: values, places, equal values at the edge, however a batch is cut."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mi_pipe.saes.batch_selection import BatchSelection, top_k_flat
from mi_pipe.saes.code import SparseCode, above, n_true, true_positions
from mi_pipe.saes.selection import _fold, top_k_rows

DTYPES = st.sampled_from([torch.float32, torch.float64])


def random_values(n_rows: int, width: int, n_levels: int | None, seed: int, dtype=torch.float32):
    """Normal values, or a few levels, so that many are equal."""
    values = torch.randn(n_rows, width, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return values if n_levels is None else (values * n_levels / 3).round()


def largest_of_batch(pre: torch.Tensor, n_kept: int) -> list[int]:
    """Positions of the `n_kept` largest positive values, the first of equal ones, by sorting tuples."""
    flat = pre.flatten().tolist()
    order = sorted((-value, place) for place, value in enumerate(flat) if value > 0)
    return sorted(place for _, place in order[:n_kept])


@settings(max_examples=60, deadline=None)
@given(
    n_rows=st.integers(1, 6),
    width=st.integers(1, 700),
    k=st.integers(1, 12),
    n_levels=st.sampled_from([None, 1, 5]),
    dtype=DTYPES,
    seed=st.integers(0, 10**6),
)
def test_row_selection_equals_sorting(n_rows, width, k, n_levels, dtype, seed):
    k = min(k, width)
    pre = random_values(n_rows, width, n_levels, seed, dtype)
    values, columns = top_k_rows(pre, k)
    assert torch.equal(values.sort(1, descending=True).values, pre.sort(1, descending=True).values[:, :k])
    assert torch.equal(pre.gather(1, columns), values)
    assert (columns.diff(dim=1) > 0).all()


def test_narrow_rows_keep_the_first_of_equal_values():
    assert top_k_rows(torch.tensor([[1.0, 2, 1, 1, 1], [0, 0, 0, 0, 0]]), 3)[1].tolist() == [[0, 1, 2], [0, 1, 2]]


def test_row_selection_works_where_all_values_are_equal():
    values, columns = top_k_rows(torch.zeros(3, 640), 4)
    assert values.abs().sum() == 0
    assert all(len(set(row)) == 4 for row in columns.tolist())


def test_row_selection_takes_what_is_not_a_number_for_large():
    """Such a batch has no finite loss, which is reported; the selection must not fail before that."""
    pre = torch.randn(4, 640, generator=torch.Generator().manual_seed(0))
    pre[2, 5] = torch.nan
    values, columns = top_k_rows(pre, 4)
    assert columns.shape == (4, 4)
    assert values.isnan().any(1).tolist() == [False, False, True, False]


def test_row_selection_of_a_view_of_other_dtypes_and_under_autograd():
    pre = random_values(6, 640, None, 0)
    assert torch.equal(top_k_rows(pre[:, ::2], 5)[1], top_k_rows(pre[:, ::2].contiguous(), 5)[1])
    wide, narrow = (top_k_rows(p, 5)[0].double().sort(1).values for p in (pre.bfloat16().double(), pre.bfloat16()))
    assert torch.equal(wide, narrow)
    values, columns = top_k_rows(pre.requires_grad_(), 5)
    values.sum().backward()
    assert torch.equal(pre.grad, torch.zeros_like(pre).scatter_(1, columns, 1.0))


def test_more_than_all_columns_is_an_error():
    with pytest.raises(RuntimeError, match="out of range"):
        top_k_rows(torch.zeros(2, 3), 4)


def test_folds_are_used_where_they_save_work():
    assert _fold(4608, 32) > 1
    assert 4608 % _fold(4608, 32) == 0
    assert _fold(4608, 2000) == _fold(4603, 32) == _fold(7, 7) == 1


@settings(max_examples=60, deadline=None)
@given(
    n_rows=st.integers(1, 40),
    width=st.integers(1, 300),
    share=st.floats(0, 1),
    shift=st.floats(-4, 2),
    n_levels=st.sampled_from([None, 2, 20]),
    chunk=st.integers(1, 40),
    seed=st.integers(0, 10**6),
)
def test_batch_selection_equals_sorting_however_it_is_cut(n_rows, width, share, shift, n_levels, chunk, seed):
    pre = random_values(n_rows, width, n_levels, seed) + shift
    n_kept = max(1, int(share * pre.numel()))
    expected = largest_of_batch(pre, n_kept)
    selection = BatchSelection(n_rows, width, n_kept)
    for start in range(0, n_rows, chunk):
        selection.add(pre[start : start + chunk])
    for positions, values in (top_k_flat(pre, n_kept), selection.result()):
        assert positions.tolist() == expected
        assert torch.equal(pre.flatten()[positions], values)
    dense = torch.zeros_like(pre).view(-1)
    dense[expected] = pre.flatten()[expected]
    assert torch.equal(selection.code().dense(), dense.view_as(pre))


@pytest.mark.parametrize("order", ["rising", "falling"])
def test_batch_selection_where_all_large_values_are_in_one_chunk(order):
    pre = torch.arange(1, 40 * 122 + 1, dtype=torch.float32).view(40, 122)
    pre = pre if order == "rising" else pre.flip(0, 1)
    selection = BatchSelection(40, 122, 300)
    for start in range(0, 40, 8):
        selection.add(pre[start : start + 8])
    assert selection.result()[0].tolist() == largest_of_batch(pre, 300)


def test_batch_selection_keeps_the_asked_number_among_equal_values():
    positions, values = top_k_flat(torch.ones(20, 30), 7)
    assert positions.tolist() == list(range(7))
    assert values.tolist() == [1.0] * 7


def test_batch_selection_holds_little_between_chunks():
    selection = BatchSelection(4000, 100, 50)
    for seed in range(40):
        selection.add(random_values(100, 100, None, seed).abs())
        assert sum(len(part) for part in selection._values) <= 50
    assert selection._bound > 2


def test_a_code_of_positions_has_their_rows_and_features():
    dense = torch.tensor([[0.0, 2, 0], [0, 0, 0], [3, 0, 4]])
    code = SparseCode.above(dense, 0.0)
    assert code.row_starts.tolist() == [0, 1, 1, 3]
    assert code.features.tolist() == [1, 0, 2]
    assert code.features.dtype == code.row_starts.dtype == torch.int32
    assert torch.equal(code.dense(), dense)
    assert true_positions(dense > 0).tolist() == [1, 6, 8]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_comparisons_are_those_of_torch(dtype):
    values = random_values(7, 30, 3, 0).to(dtype)
    for bound in (0.0, 1.0, torch.linspace(-1, 1, 30).to(dtype), torch.tensor(0.5, dtype=dtype)):
        found = above(values, bound)
        assert torch.equal(found, values > bound)
        assert n_true(found) == int((values > bound).sum())
