"""The speed and memory of a harvest: python -m bench.harvest [--tokens N] [--rounds R] [--hooks HOOK …] [--only PART]

On a random model of GPT-2 small's sizes (6 layers, prompts of 128 tokens), each way takes its turn in each round; a
JSON line for each figure has the median of the rounds' ratios in wall time, in CPU time (steadier where other programs
run), and every round's ratio. What is compared is said in bench/harvest/subject.py.

`of_bare_forward`: tokens a second of a harvest with the default config over those of the bare forward pass in the same
precision; `of_bare_forward_float32`: all in float32. `of_transformer_lens_npy`, `of_saelens`: over TransformerLens'
run_with_cache writing .npy, and over SAELens' CacheActivationsRunner (whose python the variable MI_PIPE_BENCH_SAELENS
names), both in float32; with `_float32` the harvest in float32 too. `tokens_per_s`: all of them. `peak_memory_ratio`:
peak resident memory of a whole harvest of 1,000,000 tokens over one of 10,000, each in its own process.
"""

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from bench.harvest.clock import Speed
from bench.harvest.memory import peak_bytes
from bench.harvest.models import Sizes, save_model
from bench.harvest.prompts import publish_prompts, random_tokens
from bench.harvest.saelens import PYTHON_VARIABLE, SAELens
from bench.harvest.subject import Subject
from mi_pipe.core.store import Store
from mi_pipe.models.handle import resolve_model
from stages.harvest_plan import HarvestConfig, Inputs

_FEW_TOKENS, _MANY_TOKENS = 10_000, 1_000_000


def speed_figures(
    n_tokens: int, n_rounds: int, hooks: list[str], folder: Path, sizes: Sizes
) -> Iterator[dict[str, Any]]:
    """Yield the figures of speed."""
    store = Store(folder / "store")
    tokens = random_tokens(n_tokens // sizes.n_ctx, sizes.n_ctx, sizes.d_vocab)
    model = resolve_model(str(save_model(folder / "hf", sizes)), store)
    inputs = Inputs(model, publish_prompts(store, tokens, sizes.d_vocab))
    default = Subject(HarvestConfig(hooks=hooks), inputs, folder)
    exact = Subject(HarvestConfig(hooks=hooks, precision="float32", store_dtype="float32"), inputs, folder)
    ways: dict[str, Callable[[], Speed]] = {
        "bare_float32": exact.bare,
        "harvest_float32": exact.harvest,
        "harvest": default.harvest,
        "transformer_lens_npy": exact.transformer_lens,
    }
    if default.precision != "float32":
        ways["bare"] = default.bare
    with ExitStack() as stack:
        if reason := _no_saelens(hooks):
            yield {"of_saelens": None, "reason": reason}
        else:
            saelens = SAELens(folder / "hf", tokens, hooks[0], sizes.d_model, exact.n_batch)
            ways["saelens"] = stack.enter_context(saelens).run
        found = _in_turn(ways, n_rounds)
    bare = found.get("bare", found["bare_float32"])
    yield _figure("of_bare_forward", found["harvest"], bare) | {"precision": default.precision}
    yield _figure("of_bare_forward_float32", found["harvest_float32"], found["bare_float32"])
    for peer in (name for name in ("transformer_lens_npy", "saelens") if name in found):
        yield _figure(f"of_{peer}", found["harvest"], found[peer])
        yield _figure(f"of_{peer}_float32", found["harvest_float32"], found[peer])
    yield {
        "tokens_per_s": {way: round(statistics.median(item.wall for item in speeds)) for way, speeds in found.items()},
        "tokens_per_cpu_s": {way: round(statistics.median(s.cpu for s in speeds)) for way, speeds in found.items()},
        "n_threads": torch.get_num_threads(),
    }


def _no_saelens(hooks: list[str]) -> str | None:
    if PYTHON_VARIABLE not in os.environ:
        return f"{PYTHON_VARIABLE} names no python with SAELens"
    return "SAELens caches one hook point a run" if len(hooks) > 1 else None


def _in_turn(ways: dict[str, Callable[[], Speed]], n_rounds: int) -> dict[str, list[Speed]]:
    """Measure each way once a round, after one round that is not counted."""
    found: dict[str, list[Speed]] = {name: [] for name in ways}
    for i in range(n_rounds + 1):
        for name, way in ways.items():
            speed = way()
            if i:
                found[name].append(speed)
    return found


def _figure(name: str, ours: list[Speed], others: list[Speed]) -> dict[str, Any]:
    wall = [mine.wall / other.wall for mine, other in zip(ours, others, strict=True)]
    cpu = [mine.cpu / other.cpu for mine, other in zip(ours, others, strict=True)]
    rounds = [round(value, 3) for value in wall]
    return {name: round(statistics.median(wall), 3), "cpu": round(statistics.median(cpu), 3), "rounds": rounds}


def memory_figure(folder: Path) -> dict[str, Any]:
    """Return the figure of memory."""
    peaks = {n: peak_bytes(n, folder / str(n)) for n in (_FEW_TOKENS, _MANY_TOKENS)}
    few, many = peaks[_FEW_TOKENS], peaks[_MANY_TOKENS]
    return {"peak_memory_ratio": round(many / few, 3), "peak_mb": [round(few / 1e6), round(many / 1e6)]}


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16384, help="tokens of each measurement")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each figure")
    parser.add_argument("--hooks", nargs="+", default=["blocks.3.hook_resid_post"], help="hook points")
    parser.add_argument("--folder", type=Path, help="where to write; the temporary folder by default")
    parser.add_argument("--only", choices=["speed", "memory"], help="measure one of the two")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        if args.only != "memory":
            for figure in speed_figures(args.tokens, args.rounds, args.hooks, Path(folder) / "speed", Sizes()):
                print(json.dumps(figure), flush=True)
        if args.only != "speed":
            print(json.dumps(memory_figure(Path(folder) / "memory")), flush=True)


if __name__ == "__main__":
    main()
