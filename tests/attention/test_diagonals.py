import math

import pytest
import torch

from mi_pipe.attention.diagonals import SCORES, diagonal_mean, pattern_entropy, pattern_scores, score_table


def test_diagonal_mean_of_a_worked_example():
    pattern = torch.tensor([[1.0, 0, 0], [0.25, 0.75, 0], [0.5, 0.3, 0.2]])[None, None]
    assert diagonal_mean(pattern, 1).item() == pytest.approx((0.25 + 0.3) / 2)
    assert diagonal_mean(pattern, 2).item() == pytest.approx(0.5)


def test_entropy_of_a_worked_example():
    pattern = torch.tensor([[1.0, 0], [0.5, 0.5]])[None, None]
    assert pattern_entropy(pattern).item() == pytest.approx(math.log(2) / 2)


def test_perfect_heads_score_one():
    n, length = 4, 8
    previous, duplicate, induction = (torch.zeros(length, length) for _ in range(3))
    for query in range(length):
        previous[query, max(query - 1, 0)] = 1
        duplicate[query, query - n if query >= n else query] = 1
        induction[query, query - n + 1 if query >= n - 1 else query] = 1
    scores = pattern_scores(torch.stack([previous, duplicate, induction])[None], n)[0]
    assert scores[:, :3].diagonal().tolist() == [1.0, 1.0, 1.0]
    assert scores[0, SCORES.index("induction")] == 0


def test_score_table_has_a_row_a_head():
    table = score_table(torch.arange(2 * 3 * len(SCORES)).reshape(2, 3, -1).double().numpy())
    assert list(table.columns) == ["layer", "head", *SCORES]
    assert table[["layer", "head"]].to_numpy().tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]
    assert table["previous_token"].tolist() == [0, 5, 10, 15, 20, 25]
