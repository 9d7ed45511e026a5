# pyright: basic, reportMissingImports=false, reportIndexIssue=false
"""The sparse products of a training step as Triton kernels, for GPUs; `kernels` uses them where triton is installed.

(torch's CUDA builds for Linux bring the triton that goes with them.)

`weighted_sums` serves decoding and both weight gradients: a program sums the rows of a table for one output row and one
block of columns, a few entries at a time, in float32 and in a fixed order, so that results repeat. `entry_products`
takes a block of entries and runs along the columns. Neither writes anything of the size batch * d_sae.

Tested are the numbers in Triton's interpreter on a CPU, and that they compile for sm_90
(tests/saes/test_triton_kernels.py). They have not been run or timed on a GPU; block sizes are estimates. A feature that
fires in most rows of a batch is summed by one program and may hold up the others.

The idea of such kernels: Gao et al., "Scaling and evaluating sparse autoencoders", 2024, appendix D.
"""

import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

_ENTRIES_A_STEP = 8
_ENTRIES_A_PROGRAM = 32
_LARGEST_BLOCK = 256


def weighted_sums(
    starts: Int[Tensor, " outputs_plus_one"],
    places: Int[Tensor, " entry"],
    weights: Float[Tensor, " entry"],
    table: Float[Tensor, "row width"],
) -> Float[Tensor, "output width"]:
    """Return for each output i the sum over entries e in starts[i] to starts[i + 1] of weights[e] * table[places[e]].

    Sums are in float32, the result has the table's dtype.
    """
    n_outputs, width = starts.shape[0] - 1, table.shape[1]
    out = table.new_empty(n_outputs, width)
    if out.numel():
        block = _block(width)
        grid = (n_outputs, triton.cdiv(width, block))
        table = table.contiguous()
        _weighted_sums[grid](starts, places, weights.contiguous(), table, out, width, _ENTRIES_A_STEP, block)
    return out


def entry_products(
    rows: Float[Tensor, "batch width"],
    features: Float[Tensor, "d_sae width"],
    entry_rows: Int[Tensor, " entry"],
    entry_features: Int[Tensor, " entry"],
) -> Float[Tensor, " entry"]:
    """Return rows[entry_rows[e]] · features[entry_features[e]] for each entry, in the dtype of `rows`."""
    n_entries, width = entry_rows.shape[0], rows.shape[1]
    out = rows.new_empty(n_entries)
    if n_entries:
        grid = (triton.cdiv(n_entries, _ENTRIES_A_PROGRAM),)
        arrays = (rows.contiguous(), features.contiguous(), entry_rows, entry_features, out)
        _entry_products[grid](*arrays, n_entries, width, _ENTRIES_A_PROGRAM, _block(width))
    return out


def _block(width: int) -> int:
    """Return how many columns a program takes at once, a power of two."""
    return min(_LARGEST_BLOCK, triton.next_power_of_2(width))


@triton.jit
def _weighted_sums(
    starts, places, weights, table, out, width, n_step: tl.constexpr, n_columns: tl.constexpr
):  # pragma: no cover (runs in Triton's interpreter or on a GPU)
    output = tl.program_id(0)
    columns = tl.program_id(1) * n_columns + tl.arange(0, n_columns)
    is_column = columns < width
    start, end = tl.load(starts + output), tl.load(starts + output + 1)
    total = tl.zeros((n_columns,), dtype=tl.float32)
    for first in range(start, end, n_step):
        entries = first + tl.arange(0, n_step)
        is_entry = entries < end
        place = tl.load(places + entries, mask=is_entry, other=0).to(tl.int64)
        weight = tl.load(weights + entries, mask=is_entry, other=0.0).to(tl.float32)
        at = table + place[:, None] * width + columns[None, :]
        values = tl.load(at, mask=is_entry[:, None] & is_column[None, :], other=0.0).to(tl.float32)
        total += tl.sum(weight[:, None] * values, axis=0)
    tl.store(out + output.to(tl.int64) * width + columns, total, mask=is_column)


@triton.jit
def _entry_products(
    rows, features, entry_rows, entry_features, out, n_entries, width, n_here: tl.constexpr, n_columns: tl.constexpr
):  # pragma: no cover
    entries = tl.program_id(0) * n_here + tl.arange(0, n_here)
    is_entry = entries < n_entries
    row = tl.load(entry_rows + entries, mask=is_entry, other=0).to(tl.int64)
    feature = tl.load(entry_features + entries, mask=is_entry, other=0).to(tl.int64)
    total = tl.zeros((n_here,), dtype=tl.float32)
    for first in range(0, width, n_columns):
        columns = first + tl.arange(0, n_columns)
        mask = is_entry[:, None] & (columns < width)[None, :]
        left = tl.load(rows + row[:, None] * width + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        right = tl.load(features + feature[:, None] * width + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        total += tl.sum(left * right, axis=1)
    tl.store(out + entries, total, mask=is_entry)
