"""Workers that share a stage's units: what a stage may ask of Dask, Prefect or anything else that runs functions."""

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, TypeVar

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")


class Pool(Protocol):
    """Runs a function on items in other processes, here or on other machines that see the same files."""

    @property
    def n_workers(self) -> int:
        """Number of processes that work at once."""
        ...

    def run(self, function: Callable[[ItemT], ResultT], items: Sequence[ItemT]) -> Iterator[ResultT]:
        """Yield the results as they come, in any order; raises what the function raised.

        Both travel pickled, so they are small: ids and places, never arrays. An item whose worker is lost is run
        again on another, so the function must be one that may run twice.
        """
        ...


def contiguous_shares(items: Sequence[int], n_shares: int) -> list[list[int]]:
    """Cut ascending numbers into at most `n_shares` shares of about equal size, each without gaps.

    >>> contiguous_shares([0, 1, 2, 5, 6, 7, 8], 2)
    [[0, 1, 2], [5, 6, 7, 8]]
    """
    most = max(1, -(-len(items) // max(1, n_shares)))
    shares: list[list[int]] = []
    for item in items:
        if shares and len(shares[-1]) < most and shares[-1][-1] == item - 1:
            shares[-1].append(item)
        else:
            shares.append([item])
    return shares
