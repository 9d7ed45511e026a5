import threading

import pytest
import torch

from mi_pipe.saes import row_blocks
from mi_pipe.saes.code import positions_above
from mi_pipe.saes.row_blocks import map_row_blocks
from mi_pipe.saes.selection import top_k_rows


@pytest.fixture(params=[1, 3])
def small_blocks(request, monkeypatch):
    monkeypatch.setattr(row_blocks, "_BLOCK_VALUES", 500)
    monkeypatch.setattr(torch, "get_num_threads", lambda: request.param)
    return request.param


def test_every_row_is_in_one_block_and_results_come_in_order(small_blocks):
    threads = set()

    def work(rows):
        threads.add(threading.current_thread().name)
        return list(range(rows.start, rows.stop))

    parts = map_row_blocks(work, 23, 100)
    assert [len(part) for part in parts] == [5, 5, 5, 5, 3]
    assert [row for part in parts for row in part] == list(range(23))
    assert all(name.startswith("row-blocks") for name in threads) == (small_blocks > 1)


def test_there_may_be_no_rows_or_wide_ones(small_blocks):
    assert map_row_blocks(lambda rows: rows.stop - rows.start, 0, 10) == [0]
    assert top_k_rows(torch.zeros(0, 120), 3)[0].shape == (0, 3)
    assert positions_above(torch.zeros(0, 120), 0.0).shape == (0,)
    assert map_row_blocks(lambda rows: rows.stop - rows.start, 2, 10**6) == [1, 1]


def test_an_error_in_a_block_is_raised(small_blocks):
    with pytest.raises(ZeroDivisionError):
        map_row_blocks(lambda rows: 1 // (rows.start - 5), 23, 100)


def test_results_do_not_depend_on_blocks_or_threads(small_blocks, monkeypatch):
    pre = torch.randn(50, 120, generator=torch.Generator().manual_seed(0)).mul(4).round()
    cut = top_k_rows(pre, 3), positions_above(pre, 2.0)
    monkeypatch.setattr(row_blocks, "_BLOCK_VALUES", 1 << 20)
    whole = top_k_rows(pre, 3), positions_above(pre, 2.0)
    assert torch.equal(cut[0][0], whole[0][0])
    assert torch.equal(cut[0][1], whole[0][1])
    assert torch.equal(cut[1], whole[1])
    assert torch.equal(whole[1], (pre > 2).view(-1).nonzero().squeeze(1))
