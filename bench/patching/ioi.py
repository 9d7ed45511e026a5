"""A real model's whole sweep, as the stage runs it: python -m bench.patching.ioi MODEL [--unit UNIT] [--pairs N]

Indirect object identification, every head of every layer, denoising, logit difference; `head_out_by_pos` at every
position, `head_out` at all positions together. `sweep_seconds` is one run of the stage `patch` into an empty store,
with the model's loading, the runs and checks before the sweep and the files after it; `peak_mb` is this process's.
`times` is how many times as long `transformer_lens.patching` takes in the same process: each cell costs it one whole
forward pass of the prompts of one length, so that one head of some layers is timed for each length and scaled.
"""

import argparse
import json
import tempfile
from contextlib import redirect_stderr
from io import StringIO
from typing import Any

from bench.clock import Turn, timed
from bench.harvest.memory import peak_resident_bytes
from bench.patching.subjects import TransformerLensSweep
from mi_pipe.core.stage import execute
from mi_pipe.core.store import Store
from mi_pipe.models.handle import resolve_model
from mi_pipe.models.source import ModelSource, load_source
from mi_pipe.patching.effects import PatchEffects
from mi_pipe.patching.engine import SHORTCUTS
from mi_pipe.patching.units import Unit, is_by_pos
from mi_pipe.prompts.ioi import IOIConfig
from mi_pipe.prompts.prompt_set import PromptSet
from stages import generate_prompts, patch

_UNITS: tuple[Unit, ...] = ("head_out", "head_out_by_pos")


def sweep(source: ModelSource, task: PromptSet, unit: Unit, store: Store) -> tuple[Turn, PatchEffects]:
    """Run the stage and return what it took and what it made."""
    made: list[Any] = []
    n_pairs = sum(group.n_pairs for group in task.pair_groups())
    config = patch.PatchConfig(units=[unit], max_pairs=n_pairs, device="cpu", shortcuts=list(SHORTCUTS))
    turn = timed(lambda: made.append(execute(patch.STAGE, config, patch.Inputs(source, task), store)))
    return turn, PatchEffects(made[0].artifact.path)


def transformer_lens_seconds(source: ModelSource, task: PromptSet, unit: Unit) -> float:
    """Return how long TransformerLens takes for all cells of all lengths, scaled from one layer of each length."""
    model = load_source(source, device="cpu")
    cells = model.info.n_layers * model.info.n_heads
    total = 0.0
    for group in task.pair_groups():
        with redirect_stderr(StringIO()):
            turn = timed(TransformerLensSweep(model, group, "head_out", [model.info.n_layers // 2]).turn)
        forward = turn.wall / (1 + model.info.n_heads)  # the clean run, and one run a head
        total += forward * (1 + cells * (group.n_pos if is_by_pos(unit) else 1))
    return total


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a pulled model, a HuggingFace name or a folder")
    parser.add_argument("--store", help="the store that has the model")
    parser.add_argument("--unit", choices=_UNITS, default="head_out_by_pos")
    parser.add_argument("--pairs", type=int, default=32)
    asked = parser.parse_args()
    source = resolve_model(asked.model, Store(asked.store), device="cpu")
    with tempfile.TemporaryDirectory() as folder:
        store = Store(folder)
        config = IOIConfig(n_pairs=asked.pairs)
        prompts = execute(generate_prompts.STAGE, config, generate_prompts.Inputs(source), store)
        task = PromptSet(prompts.artifact.path)
        turn, effects = sweep(source, task, asked.unit, store)
        print(json.dumps(_figure(turn, effects, asked.unit)), flush=True)
        theirs = transformer_lens_seconds(source, task, asked.unit)
    print(json.dumps({"times": round(theirs / turn.wall, 1), "transformer_lens_seconds": round(theirs)}), flush=True)


def _figure(turn: Turn, effects: PatchEffects, unit: Unit) -> dict[str, Any]:
    return {
        "sweep_seconds": round(turn.wall, 1),
        "cpu_seconds": round(turn.cpu, 1),
        "foreign_cores": turn.foreign_cores,
        "peak_mb": round(peak_resident_bytes() / 1e6),
        "unit": unit,
        "cells": int(effects.to_xarray()[unit].notnull().sum()),
        "recovered_largest": round(float(abs(effects.recovered(unit)).max()), 3),
    }


if __name__ == "__main__":
    main()
