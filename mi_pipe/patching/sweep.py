"""Sweeps: every position or every head of a layer patched alone, as rows for an engine.

Before the first position where clean and corrupted prompts differ a patch changes nothing: there the value is
the base run's own, exactly, and nothing is run.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mi_pipe.core.errors import HookPointError
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
# A batch counts as large enough from this share of the token budget on (2048 / 16 = 128 tokens on a CPU).
_FULL_SHARE = 16


def hook_of(unit: Unit, layer: int) -> str:
    """Return the hook point of a unit.

    >>> hook_of("head_out", 3)
    'blocks.3.attn.hook_z'
    """
    return f"blocks.{layer}.{_HOOKS[unit]}"


def present_units(units: Sequence[Unit], hooks: HookMap, n_layers: int) -> list[Unit]:
    """Return the units that every layer of the model has (an attention-only one has no mlp_out), in UNITS' order.

    Raises HookPointError for a unit that only the bridge can reach, which the plain model cannot be patched at.
    """
    asked: list[Unit] = [unit for unit in UNITS if unit in units]
    found: list[Unit] = [unit for unit in asked if all(hook_of(unit, layer) in hooks for layer in range(n_layers))]
    for unit in found:
        if any(hooks[hook_of(unit, layer)].module_path is None for layer in range(n_layers)):
            rest = ", ".join(other for other in found if other != unit)
            raise HookPointError(
                f"{unit} of this model is not the input or output of one of its own modules and cannot be patched. "
                f"Leave it out: units=[{rest}]."
            )
    if not found:
        raise HookPointError(f"The model has none of the units {', '.join(units)}. Units are {', '.join(UNITS)}.")
    return found


@dataclass(frozen=True)
class Cells:
    """The single patches of one layer: row r patches pair[r] at column[r], a position or a head."""

    pair: Int[Tensor, " row"]
    column: Int[Tensor, " row"]
    first_pos: Int[Tensor, " row"]
    """The first position that the patch can change."""

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
            index = order[start:stop]
            yield Cells(self.pair[index], self.column[index], self.first_pos[index])
            start = stop


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
    for batch in cells.batches(runs.n_pos, batch_tokens):
        mask = _head_mask(batch.column, n_heads, d_head) if by_head else _position_mask(batch.column, runs.n_pos)
        patches = Patches(hook, batch.pair, mask, int(batch.first_pos[0]))
        values[batch.pair, batch.column] = engine.patched_metric(patches)
    return values.cpu().numpy()


def _position_mask(position: Int[Tensor, " row"], n_pos: int) -> Bool[Tensor, "row pos 1"]:
    return (torch.arange(n_pos, device=position.device) == position[:, None])[:, :, None]


def _head_mask(head: Int[Tensor, " row"], n_heads: int, d_head: int) -> Bool[Tensor, "row 1 width"]:
    own = torch.arange(n_heads, device=head.device) == head[:, None]
    return own.repeat_interleave(d_head, dim=1)[:, None]
