"""Sweeps: every position or every head of a layer patched alone, as rows for an engine.

Before the first position where clean and corrupted prompts differ a patch changes nothing: there the value is
the base run's own, exactly, and nothing is run.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mi_pipe.models.hook_points import HookMap
from mi_pipe.patching.engine import PatchEngine, Patches

Unit = Literal["resid_pre", "attn_out", "mlp_out", "head_out"]
UNITS: tuple[Unit, ...] = get_args(Unit)
_HOOKS: dict[Unit, str] = {
    "resid_pre": "hook_resid_pre",
    "attn_out": "hook_attn_out",
    "mlp_out": "hook_mlp_out",
    "head_out": "attn.hook_z",
}


def hook_of(unit: Unit, layer: int) -> str:
    """Return the hook point of a unit.

    >>> hook_of("head_out", 3)
    'blocks.3.attn.hook_z'
    """
    return f"blocks.{layer}.{_HOOKS[unit]}"


def present_units(units: tuple[Unit, ...], hooks: HookMap) -> list[Unit]:
    """Return the units that the model has (an attention-only model has no mlp_out), in their order."""
    return [unit for unit in units if hook_of(unit, 0) in hooks]


@dataclass(frozen=True)
class Cells:
    """The single patches of one layer: row r patches pair[r] at column[r], a position or a head."""

    pair: Int[Tensor, " row"]
    column: Int[Tensor, " row"]
    first_pos: Int[Tensor, " row"]
    """The first position that the patch can change."""

    def batches(self, rows: int) -> Iterator["Cells"]:
        """Yield the cells in batches of one `first_pos` and at most `rows`."""
        for first in self.first_pos.unique():
            for index in (self.first_pos == first).nonzero().squeeze(1).split(rows):
                yield Cells(self.pair[index], self.column[index], self.first_pos[index])


def position_cells(first_change: Int[Tensor, " pair"], n_pos: int) -> Cells:
    """Return every (pair, position) from each pair's first differing token on."""
    positions = torch.arange(n_pos, device=first_change.device)
    pair, column = (positions >= first_change[:, None]).nonzero(as_tuple=True)
    return Cells(pair, column, column)


def head_cells(first_change: Int[Tensor, " pair"], n_pos: int, n_heads: int) -> Cells:
    """Return every (pair, head) of the pairs that differ at all."""
    differs = (first_change < n_pos)[:, None].expand(-1, n_heads)
    pair, column = differs.nonzero(as_tuple=True)
    return Cells(pair, column, first_change[pair])


def sweep_layer(
    engine: PatchEngine, unit: Unit, layer: int, n_heads: int, batch_tokens: int
) -> Float[np.ndarray, "pair column"]:
    """Return the metric of each pair patched at each position (for `head_out`: at each head) of one layer, float32.

    `batch_tokens` bounds rows x positions of one forward pass.
    """
    runs, hook = engine.runs, hook_of(unit, layer)
    by_head = unit == "head_out"
    n_columns = n_heads if by_head else runs.n_pos
    cells = (
        head_cells(runs.first_change, runs.n_pos, n_heads) if by_head else position_cells(runs.first_change, runs.n_pos)
    )
    values = runs.base_metric[:, None].repeat(1, n_columns)
    d_head = runs.donors[hook].shape[-1] // n_heads
    for batch in cells.batches(max(1, batch_tokens // runs.n_pos)):
        mask = _head_mask(batch.column, n_heads, d_head) if by_head else _position_mask(batch.column, runs.n_pos)
        patches = Patches(hook, batch.pair, mask, int(batch.first_pos[0]))
        values[batch.pair, batch.column] = engine.patched_metric(patches)
    return values.cpu().numpy()


def _position_mask(position: Int[Tensor, " row"], n_pos: int) -> Bool[Tensor, "row pos 1"]:
    return (torch.arange(n_pos, device=position.device) == position[:, None])[:, :, None]


def _head_mask(head: Int[Tensor, " row"], n_heads: int, d_head: int) -> Bool[Tensor, "row 1 width"]:
    own = torch.arange(n_heads, device=head.device) == head[:, None]
    return own.repeat_interleave(d_head, dim=1)[:, None]
