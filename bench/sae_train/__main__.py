"""The speed of SAE training: python -m bench.sae_train [--architecture A] [--peer NAME=PYTHON …] [--rounds R] [--sweep]

TopK k 32, d_in 576, d_sae 4,608, batches of 4,096, float32 by default. Ours, the floor and the peers take turns of some
steps, round after round; rounds during which other programs used more than 0.15 of a core are repeated, up to twice as
many. A JSON line for each figure has the median over the rounds of the ratio in wall time, in CPU time (steadier where
other programs run, but it counts threads that wait), and every round's ratio. What is compared is said in
bench/sae_train/subject.py; peers run with their own trainers and defaults on rows in memory.

`of_floor`: tokens a second of our training over those of one encoder product and fused Adam. `times_peer`: over those
of a peer (saelens, dictionary_learning or sparsify; PYTHON is that of a virtual environment that has it). `bfloat16`
(with --bfloat16): ours with the encoder's product in bfloat16 over ours in float32. `of_four_single_runs` (with
--sweep): seconds of four SAEs trained in one pass over four times those of one. `tokens_per_s`: all of them.
`--quality STORE_ID` is another measurement, see bench/sae_train/quality.py.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch

from bench.sae_train import peer, quality
from bench.sae_train.peer import Peer
from bench.sae_train.rows import mixture
from bench.sae_train.subject import Floor, Sizes, Training, store_of
from bench.turns import Ways, in_turn, speed_ratio
from mi_pipe.core.freed_memory import freed_memory_kept
from mi_pipe.core.store import Store
from mi_pipe.saes.architectures.base import ArchitectureName

_N_ROWS = 1 << 17
_N_SAES = 4


def figures(args: argparse.Namespace, sizes: Sizes, n_rows: int, folder: Path) -> Iterator[dict[str, Any]]:
    """Yield one dict a figure."""
    rows = mixture(n_rows, sizes.d_in)
    store = store_of(rows, Store(folder / "store"))
    with ExitStack() as stack:
        stack.enter_context(freed_memory_kept())  # as the stage does
        train = partial(_training, stack, store, sizes=sizes)
        ways: Ways = {"floor": Floor(rows, sizes).turn, "ours": train([args.architecture])}
        if args.bfloat16:
            ways["ours_bfloat16"] = train([args.architecture], precision="bfloat16")
        if args.sweep:
            ways["sweep"] = train([args.architecture] * _N_SAES)
        if args.peer:
            options = _peer_options(args.architecture, sizes, folder, rows)
            ways |= {name: stack.enter_context(Peer(name, python, options, folder)).turn for name, python in args.peer}
        found = in_turn(ways, args.rounds)
    yield speed_ratio("of_floor", found["ours"], found["floor"]) | {"architecture": args.architecture}
    for name, _ in args.peer:
        yield {"peer": name, **speed_ratio("times_peer", found["ours"], found[name])}
    if args.bfloat16:
        yield speed_ratio("bfloat16", found["ours_bfloat16"], found["ours"])
    if args.sweep:
        yield speed_ratio("of_four_single_runs", found["ours"], found["sweep"], 1 / _N_SAES)
    per_turn = {name: sizes.turn_rows * (_N_SAES if name == "sweep" else 1) for name in found}
    yield {
        "tokens_per_s": {
            n: round(per_turn[n] / statistics.median(t.wall for t in turns)) for n, turns in found.items()
        },
        "tokens_per_cpu_s": {
            n: round(per_turn[n] / statistics.median(t.cpu for t in turns)) for n, turns in found.items()
        },
        "foreign_cores": max((t.foreign_cores or 0.0 for turns in found.values() for t in turns), default=0.0),
        "n_quiet_rounds": sum(all(t.is_quiet for t in round_) for round_ in zip(*found.values(), strict=True)),
        "n_threads": torch.get_num_threads(),
    }


def _training(
    stack: ExitStack, store: Any, architectures: list[ArchitectureName], sizes: Sizes, **options: Any
) -> Callable[[], None]:
    training = Training(store, architectures, sizes, **options)
    stack.callback(training.close)
    return training.turn


def _peer_options(architecture: str, sizes: Sizes, folder: Path, rows: torch.Tensor) -> dict[str, Any]:
    np.save(folder / "rows.npy", rows.numpy())
    return {
        "rows": str(folder / "rows.npy"),
        "architecture": architecture,
        **{name: getattr(sizes, name) for name in ("d_sae", "k", "batch_rows", "n_steps")},
        "n_threads": torch.get_num_threads(),
    }


def _named_python(text: str) -> tuple[str, str]:
    name, _, python = text.partition("=")
    if name not in peer.NAMES or not Path(python).is_file():
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=PYTHON with NAME one of {', '.join(peer.NAMES)}")
    return name, python


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """Read the command line; peers other than SAELens have TopK alone."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--architecture", choices=get_args(ArchitectureName), default="topk", help="of ours and SAELens"
    )
    parser.add_argument("--peer", type=_named_python, action="append", default=[], metavar="NAME=PYTHON")
    parser.add_argument("--rounds", type=int, default=5, help="quiet turns of each")
    parser.add_argument("--steps", type=int, default=Sizes.n_steps, help="steps of a turn")
    parser.add_argument("--bfloat16", action="store_true", help="also with the encoder's product in bfloat16")
    parser.add_argument("--sweep", action="store_true", help="also four SAEs in one pass")
    parser.add_argument("--folder", type=Path, help="where to write (0.5 GB); the temporary folder by default")
    quality.add_arguments(parser)
    args = parser.parse_args(words)
    if args.architecture != "topk" and any(name != "saelens" for name, _ in args.peer):
        parser.error("only SAELens is compared in architectures other than topk")
    return args


def main() -> None:
    """Print the figures."""
    args = parse()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        if args.quality:
            found = quality.figures(args, Path(folder))
        else:
            found = figures(args, Sizes(n_steps=args.steps), _N_ROWS, Path(folder))
        for figure in found:
            print(json.dumps(figure), flush=True)


if __name__ == "__main__":
    main()
