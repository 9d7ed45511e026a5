import torch

from mi_pipe.patching.cells import part_cells, position_cells


def test_cells_are_every_position_from_the_first_difference_on():
    cells = position_cells(torch.tensor([1, 3, 4]), n_pos=4)
    assert list(zip(cells.pair.tolist(), cells.pos.tolist(), strict=True)) == [(0, 1), (0, 2), (0, 3), (1, 3)]


def test_heads_of_equal_prompts_are_not_run():
    cells = part_cells(torch.tensor([2, 4]), n_pos=4, n_parts=3)
    assert cells.pair.tolist() == [0, 0, 0]
    assert cells.part.tolist() == [0, 1, 2]
    assert cells.pos.tolist() == [-1, -1, -1]
    assert cells.first_pos.tolist() == [2, 2, 2]


def test_batches_hold_every_cell_once_within_the_budget():
    cells = position_cells(torch.tensor([0, 1, 2, 2, 5]), n_pos=9)
    for budget in (1, 20, 64, 10_000):
        batches = list(cells.batches(9, budget))
        found = [(p, c) for b in batches for p, c in zip(b.pair.tolist(), b.pos.tolist(), strict=True)]
        assert sorted(found) == sorted(zip(cells.pair.tolist(), cells.pos.tolist(), strict=True))
        for batch in batches:
            first = int(batch.first_pos[0])
            assert first == int(batch.first_pos.min())
            assert len(batch.pair) == 1 or len(batch.pair) * (9 - first) <= budget


def test_few_rows_are_joined_by_those_of_later_positions():
    cells = position_cells(torch.tensor([0]), n_pos=32)
    assert max(len(batch.pair) for batch in cells.batches(32, 16 * 32 * 4)) >= 4
    assert len(list(cells.batches(32, 16 * 32 * 4))) < 10


def test_cells_by_part_and_position_and_at_chosen_positions():
    only = torch.tensor([[False, True, True, True]])
    cells = position_cells(torch.tensor([2]), n_pos=4, n_parts=2, only=only)
    assert list(zip(cells.part.tolist(), cells.pos.tolist(), strict=True)) == [(0, 2), (0, 3), (1, 2), (1, 3)]
    assert position_cells(torch.tensor([2]), n_pos=4, n_parts=2, at_last=True).pos.tolist() == [3, 3]
