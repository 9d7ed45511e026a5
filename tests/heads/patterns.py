"""Attention patterns built by hand."""

import torch


def induction_pattern(period: int, n_pos: int) -> torch.Tensor:
    """From the second copy on, all attention on the token after the latest earlier occurrence; before, on itself."""
    pattern = torch.zeros(n_pos, n_pos)
    for query in range(n_pos):
        pattern[query, query - period + 1 if query >= period else query] = 1
    return pattern


def spread_induction_pattern(period: int, n_pos: int) -> torch.Tensor:
    """As an induction head, but evenly over all earlier occurrences."""
    pattern = torch.zeros(n_pos, n_pos)
    for query in range(n_pos):
        keys = [query - period * k + 1 for k in range(1, query // period + 1)] or [query]
        pattern[query, keys] = 1 / len(keys)
    return pattern


def previous_pattern(n_pos: int) -> torch.Tensor:
    pattern = torch.zeros(n_pos, n_pos)
    pattern[range(n_pos), [max(query - 1, 0) for query in range(n_pos)]] = 1
    return pattern
