"""Work on blocks of rows by several threads: for numpy, which works in the calling thread and lets others run.

Blocks are small enough to stay in a core's cache. What is done to a row must not depend on its block, so that results
do not depend on the number of threads.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

_BLOCK_VALUES = 1 << 20

ResultT = TypeVar("ResultT")


def map_row_blocks(work: Callable[[slice], ResultT], n_rows: int, row_values: int) -> list[ResultT]:
    """Return `work(rows)` for consecutive blocks of rows, in their order.

    A row has `row_values` values; without rows there is one empty block. As many threads work as torch uses, none
    beside the caller for a single block.
    """
    block_rows = max(1, _BLOCK_VALUES // max(1, row_values))
    blocks = [slice(start, min(start + block_rows, n_rows)) for start in range(0, max(1, n_rows), block_rows)]
    n_threads = min(torch.get_num_threads(), len(blocks))
    if n_threads < 2:  # noqa: PLR2004
        return [work(block) for block in blocks]
    with ThreadPoolExecutor(n_threads, thread_name_prefix="row-blocks") as pool:
        return list(pool.map(work, blocks))
