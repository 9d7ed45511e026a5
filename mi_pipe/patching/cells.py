"""The single patches of one unit at one layer, and the batches they are run in.

Before the first position where the donor's value can differ a patch changes nothing, and in the last layer only the
last position is read: such cells are not run, their value is the base run's own, exactly.
"""

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

# A batch counts as large enough from this share of the token budget on (2048 / 16 = 128 tokens).
_FULL_SHARE = 16


@dataclass(frozen=True)
class Cells:
    """Row r patches pair[r]: part[r] of the width (0 where it is whole) at pos[r] (-1 for all positions)."""

    pair: Int[Tensor, " row"]
    part: Int[Tensor, " row"]
    pos: Int[Tensor, " row"]
    first_pos: Int[Tensor, " row"]
    """The first position that the patch can change."""

    def __len__(self) -> int:
        """Return the number of cells."""
        return len(self.pair)

    def take(self, rows: Tensor) -> "Cells":
        """Return some of the cells."""
        return Cells(self.pair[rows], self.part[rows], self.pos[rows], self.first_pos[rows])

    def batches(self, n_pos: int, batch_tokens: int) -> Iterator["Cells"]:
        """Yield all cells in batches whose rows run from the batch's lowest `first_pos` to the end.

        Rows of one `first_pos` go together, at most `batch_tokens` tokens; few rows are joined by those of later
        positions, until the batch is large enough to be worth a forward pass.
        """
        order = self.first_pos.argsort(stable=True)
        firsts: list[int] = self.first_pos[order].tolist()
        start = 0
        while start < len(firsts):
            width = n_pos - firsts[start]
            enough = start + -(-batch_tokens // (_FULL_SHARE * width))
            most = start + max(1, batch_tokens // width)
            stop = min(most, max(enough, bisect_right(firsts, firsts[start])))
            yield self.take(order[start:stop])
            start = stop


def position_cells(
    first_change: Int[Tensor, " pair"],
    n_pos: int,
    n_parts: int = 1,
    only: Bool[Tensor, "pair pos"] | None = None,
    at_last: bool = False,
) -> Cells:
    """Return every (pair, part, position) from each pair's first change on.

    `only` chooses positions; with `at_last` it is the last position alone (of a local unit in the last layer).
    """
    positions = torch.arange(n_pos, device=first_change.device)
    wanted = positions >= first_change[:, None]
    if only is not None:
        wanted = wanted & only
    if at_last:
        wanted = wanted & (positions == n_pos - 1)
    pair, part, pos = wanted[:, None].expand(-1, n_parts, -1).nonzero(as_tuple=True)
    return Cells(pair, part, pos, pos)


def part_cells(first_change: Int[Tensor, " pair"], n_pos: int, n_parts: int) -> Cells:
    """Return every (pair, part), all positions at once, of the pairs that differ at all."""
    differs = (first_change < n_pos)[:, None].expand(-1, n_parts)
    pair, part = differs.nonzero(as_tuple=True)
    return Cells(pair, part, torch.full_like(pair, -1), first_change[pair])
