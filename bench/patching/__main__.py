"""The speed of patching sweeps: python -m bench.patching [--rounds R] [--part PART …] [--all-cells] [--threads N]

A random GPT-2-like model (12 layers, d_model 256, 8 heads, vocabulary 50,257), 16 pairs of prompts of 16 tokens,
float32, denoising, logit difference. mi_pipe's engine and TransformerLens' own `transformer_lens.patching` take turns
in one process, round after round (what a turn includes is said in bench/patching/subjects.py); rounds during which
other programs used more than 0.15 of a core are repeated, up to twice as many. A JSON line for each figure has the
median of the rounds' ratios in wall time, in CPU time (steadier where other programs run), and every round's ratio.

`heads_times`: times as fast, every head's z at all positions, prompts equal before position 10;
`heads_no_prefix_times`: equal nowhere; `heads_by_position_times`: every head at every position, prompts equal before
position 10, where TransformerLens sweeps some layers and its seconds are scaled to all (every cell costs it the same
one forward pass; --all-cells sweeps all, minutes a round). `max_abs_diff`: largest difference of all cells that both
measured, beside the largest metric. `peak_mb`: resident memory of a process that does one head sweep alone, and of
one that only loads.
"""

import argparse
import json
import statistics
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from bench.clock import Turn
from bench.patching.memory import peaks
from bench.patching.model import Sizes, random_model, random_pairs
from bench.patching.subjects import Sweep, TransformerLensSweep
from bench.turns import in_turn, speed_ratio
from mi_pipe.models.model import Model
from mi_pipe.patching.units import Unit

_SHARED = 10
_PARTS: dict[str, tuple[Unit, int]] = {
    "heads": ("head_out", _SHARED),
    "heads_no_prefix": ("head_out", 0),
    "heads_by_position": ("head_out_by_pos", _SHARED),
}
_SAMPLED_LAYERS = (0, 6)


def figures(model: Model, sizes: Sizes, part: str, n_rounds: int, all_cells: bool) -> Iterator[dict[str, Any]]:
    """Yield the figures of one part."""
    unit, n_shared = _PARTS[part]
    group = random_pairs(sizes, n_shared)
    layers = range(sizes.n_layers)
    if unit.endswith("_by_pos") and not all_cells:
        layers = [layer for layer in _SAMPLED_LAYERS if layer < sizes.n_layers]
    ours, theirs = Sweep(model, group, unit), TransformerLensSweep(model, group, unit, layers)
    found = in_turn({"ours": ours.turn, "transformer_lens": theirs.turn}, n_rounds)
    scaled = sizes.n_layers / len(layers)
    seconds = {name: _seconds(turns, scaled if name != "ours" else 1.0) for name, turns in found.items()}
    yield speed_ratio(f"{part}_times", found["ours"], found["transformer_lens"], scaled) | {"seconds": seconds}
    yield {
        "max_abs_diff": float(np.nanmax(np.abs(ours.values - theirs.values))),
        "largest_metric": round(ours.scale, 4),
        "part": part,
        "foreign_cores": max(turn.foreign_cores or 0.0 for turns in found.values() for turn in turns),
        "n_threads": torch.get_num_threads(),
    }


def _seconds(turns: list[Turn], factor: float) -> dict[str, float]:
    wall, cpu = (statistics.median(getattr(turn, clock) for turn in turns) for clock in ("wall", "cpu"))
    return {"wall": round(factor * wall, 3), "cpu": round(factor * cpu, 3)}


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="quiet turns of each")
    parser.add_argument("--part", choices=[*_PARTS, "memory"], nargs="+", default=[*_PARTS, "memory"])
    parser.add_argument("--all-cells", action="store_true", help="let TransformerLens sweep every layer by position")
    parser.add_argument("--threads", type=int, help="threads of torch; its own choice by default")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    sizes = Sizes()
    model = random_model(sizes)
    for part in (name for name in args.part if name != "memory"):
        for figure in figures(model, sizes, part, args.rounds, args.all_cells):
            print(json.dumps(figure), flush=True)
    if "memory" in args.part:
        print(json.dumps({"peak_mb": peaks()}), flush=True)


if __name__ == "__main__":
    main()
