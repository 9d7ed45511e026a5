"""Sweeps: every cell of a unit at a layer patched alone, as rows for an engine."""

import logging
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mi_pipe.models.info import ModelInfo
from mi_pipe.patching.cells import Cells, part_cells, position_cells
from mi_pipe.patching.engine import PatchEngine
from mi_pipe.patching.patches import Patches
from mi_pipe.patching.runs import PairRuns
from mi_pipe.patching.units import Unit, axes_of, hook_of, is_by_pos, is_local, is_of_sae, n_parts, part_of

_log = logging.getLogger(__name__)
DEFAULT_BATCH_BYTES = 256 << 20
_FEWEST_TOKENS, _MOST_TOKENS = 64, 1 << 16
_WIDTHS_HELD = 12
"""A token of a batch holds about so many values of d_model, beside those of its MLP."""


def batch_tokens(info: ModelInfo, n_bytes: int = DEFAULT_BATCH_BYTES, needs_all_logits: bool = False) -> int:
    """Return how many tokens (rows times positions) of one forward pass fit into a memory budget, about.

    With all logits a row is counted as one token, which holds for rows of one position and is careful for others.
    """
    values = _WIDTHS_HELD * info.d_model + 4 * (info.d_mlp or 0) + (3 * info.d_vocab if needs_all_logits else 0)
    return max(_FEWEST_TOKENS, min(_MOST_TOKENS, n_bytes // (4 * values)))


def sweep_layer(
    engine: PatchEngine,
    unit: Unit,
    layer: int,
    batch_tokens: int,
    only: Bool[Tensor, "pair pos"] | None = None,
    neurons: Sequence[int] = (),
) -> Float[np.ndarray, "pair *axes"]:
    """Return the metric of each pair with each cell of a unit patched at one layer, float32.

    Axes are those of `axes_of(unit)`: positions, heads, key/value heads, the given `neurons`, or the layer's chosen
    features; with `only`, units by position are patched at these positions alone (NaN elsewhere). `batch_tokens` bounds
    rows x positions of a forward pass.
    """
    runs, info = engine.runs, engine.model.info
    parts = n_parts(unit, info, _n_chosen(runs, unit, layer, neurons))
    if is_by_pos(unit):
        is_read_last = is_local(unit) and layer == info.n_layers - 1
        cells = position_cells(runs.first_change, runs.n_pos, parts, only, is_read_last)
    else:
        cells = part_cells(runs.first_change, runs.n_pos, parts)
    values = runs.base_metric[:, None, None].repeat(1, parts, runs.n_pos if is_by_pos(unit) else 1)
    if only is not None and is_by_pos(unit):
        values = values.masked_fill(~only[:, None], torch.nan)
    values[cells.pair, cells.part, cells.pos.clamp_min(0)] = patched_cells(
        engine, unit, layer, cells, batch_tokens, neurons
    )
    return values.reshape(runs.n_pairs, *_sizes(unit, parts, runs.n_pos)).cpu().numpy()


def patched_cells(
    engine: PatchEngine, unit: Unit, layer: int, cells: Cells, batch_tokens: int, neurons: Sequence[int] = ()
) -> Float[Tensor, " cell"]:
    """Return the metric of each of some cells of a unit at a layer, patched alone."""
    runs = engine.runs
    out = runs.base_metric.new_empty(len(cells))
    numbered = Cells(cells.pair, torch.arange(len(cells), device=cells.pair.device), cells.pos, cells.first_pos)
    for batch in numbered.batches(runs.n_pos, batch_tokens):
        rows = batch.part
        out[rows] = engine.patched_metric(_patches(engine, unit, layer, cells.take(rows), neurons))
    if n_lost := int(out.isnan().sum()):
        _log.warning(
            "%s, layer %d: the metric of %d of %d patched runs is NaN, as if they had not been measured",
            unit, layer, n_lost, len(out),
        )  # fmt: skip
    return out


def _patches(engine: PatchEngine, unit: Unit, layer: int, cells: Cells, neurons: Sequence[int]) -> Patches:
    saes = engine.runs.saes
    return Patches(
        hook=hook_of(unit, layer, saes.hook(layer) if saes is not None and is_of_sae(unit) else None),
        pair=cells.pair,
        part=_parts(unit, cells.part, neurons),
        part_width=1 if part_of(unit) == "neuron" else engine.model.info.d_head,
        pos=cells.pos if is_by_pos(unit) else None,
        first_pos=int(cells.first_pos.min()),
        feature=cells.part if part_of(unit) == "feature" else None,
    )


def _n_chosen(runs: PairRuns, unit: Unit, layer: int, neurons: Sequence[int]) -> int:
    if part_of(unit) != "feature":
        return len(neurons)
    assert runs.saes is not None, "only layers with an SAE are swept"
    return len(runs.saes.features[layer])


def _parts(unit: Unit, part: Int[Tensor, " row"], neurons: Sequence[int]) -> Int[Tensor, " row"] | None:
    if part_of(unit) in (None, "feature"):
        return None
    return torch.tensor(neurons, device=part.device)[part] if part_of(unit) == "neuron" else part


def _sizes(unit: Unit, parts: int, n_pos: int) -> tuple[int, ...]:
    return tuple(n_pos if axis == "pos" else parts for axis in axes_of(unit))
