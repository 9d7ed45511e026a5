"""Do peers read our folders as we mean them, and we theirs? python -m bench.sae_formats --peer NAME=PYTHON ...

NAME is saelens, sparsify or dictionary_learning, PYTHON the interpreter of an environment that has it. SAEs of every
architecture with made-up weights are published, exported, loaded by the peer's own loader in its environment, and run
on the same raw activations; then the other way, what the peer's own saver wrote is read by us. A JSON line for each SAE
has the largest |difference| of features and of outputs, and `scale`, the largest |output|; the last line sums up.
Float32 rounding is a few 1e-7 of the scale. `--set ID` also exports a set of the store that was trained in earnest.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import mi_pipe
from bench.sae_formats.peer import EXPECTED, PEERS
from bench.sae_formats.samples import READ, WRITTEN, every_sae, inputs_of, publish_saes
from mi_pipe.core.store import Store
from mi_pipe.export.sae_formats.exporting import SAE_FORMATS, export_saes
from mi_pipe.export.sae_formats.importing import read_sae_folder
from mi_pipe.export.sae_formats.packed import PROBE_FILE, Form
from mi_pipe.saes.sae import SAE
from mi_pipe.saes.sae_set import SAESet

_READABLE = ("saelens", "sparsify")
_PEER = Path(__file__).parent / "peer.py"


def ours_read_by_peer(peer: str, python: str, saes: SAESet, rows: int, folder: Path) -> Iterator[dict[str, Any]]:
    """Export what the peer's format holds, let the peer run it, and yield the differences."""
    chosen = {name: saes[name] for name in saes if SAE_FORMATS[peer].holds(Form.of(saes[name]))}
    exported = export_saes(saes, peer, folder / f"{peer}-{saes.id}", list(chosen))
    inputs = {name: inputs_of(sae, rows) if rows else _probe(exported / name) for name, sae in chosen.items()}
    asked, answered = folder / f"{peer}-in.safetensors", folder / f"{peer}-out.safetensors"
    save_file(inputs, asked)
    version = run_peer(python, "load", peer, exported, asked, answered)
    found = load_file(answered)
    for name, sae in chosen.items():
        theirs = found[f"{name}.features"], found[f"{name}.output"]
        yield {"peer": peer, "version": version, "way": "ours read by peer", "sae": name} | _differences(
            sae, inputs[name], *theirs
        )


def peers_read_by_us(peer: str, python: str, sizes: dict[str, int], folder: Path) -> Iterator[dict[str, Any]]:
    """Let the peer save SAEs of its own, read them, and yield the differences."""
    saved = folder / f"{peer}-own"
    version = run_peer(python, "save", peer, saved, json.dumps(sizes))
    for path in sorted(saved.iterdir()):
        hooks = f"{READ} -> {WRITTEN}" if path.name.endswith("mlp") else ""
        sae, expected = read_sae_folder(path, hooks).sae, load_file(path / EXPECTED)
        yield {"peer": peer, "version": version, "way": "peer's read by us", "sae": path.name} | _differences(
            sae, expected["input"], expected["features"], expected["output"]
        )


def run_peer(python: str, *words: str | Path) -> str:
    """Run `peer.py` in a peer's environment; return the peer's version."""
    done = subprocess.run([python, _PEER, *map(str, words)], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{python} {_PEER.name} {words[0]} {words[1]} failed:\n{done.stderr[-3000:]}")
    return done.stdout.splitlines()[-1]


def _probe(folder: Path) -> torch.Tensor:
    return load_file(folder / PROBE_FILE)["input"]


@torch.no_grad()
def _differences(sae: SAE, x: torch.Tensor, features: torch.Tensor, output: torch.Tensor) -> dict[str, Any]:
    ours, made = sae.encode(x), sae(x)
    return {
        "architecture": sae.architecture,
        "kind": sae.sites.kind,
        "rule": sae.rule.kind,
        "d_sae": sae.d_sae,
        "l0": round(float((ours > 0).float().sum(1).mean()), 2),
        "max_difference_features": float((ours - features).abs().max()),
        "max_difference_output": float((made - output).abs().max()),
        "scale": float(made.abs().max()),
    }


def main() -> None:
    """Print a line for each SAE and way, and the largest difference over all of them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--peer", action="append", required=True, metavar="NAME=PYTHON")
    parser.add_argument("--set", dest="sets", action="append", default=[], metavar="ID", help="a set of the store")
    parser.add_argument("--d-in", type=int, default=96)
    parser.add_argument("--d-sae", type=int, default=768)
    parser.add_argument("--k", type=int, default=16)
    parser.add_argument("--rows", type=int, default=256)
    given = parser.parse_args()
    torch.set_num_threads(1)
    sizes = {"d_in": given.d_in, "d_out": given.d_in * 2 // 3, "d_sae": given.d_sae, "k": given.k, "rows": given.rows}
    lines: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as root:
        made = publish_saes(Store(Path(root) / "store"), every_sae(given.d_in, given.d_sae, given.k, sizes["d_out"]))
        for peer, _, python in (word.partition("=") for word in given.peer):
            if peer not in PEERS:
                sys.exit(f"{peer!r} is no peer: {', '.join(PEERS)}")
            lines += _printed(ours_read_by_peer(peer, python, made, given.rows, Path(root)))
            for name in given.sets:
                saes = mi_pipe.open(name)
                assert isinstance(saes, SAESet), f"{name} is no set of SAEs"
                lines += _printed(ours_read_by_peer(peer, python, saes, 0, Path(root)))
            if peer in _READABLE:
                lines += _printed(peers_read_by_us(peer, python, sizes, Path(root)))
    largest = {key: max(line[key] for line in lines) for key in ("max_difference_features", "max_difference_output")}
    relative = max(line["max_difference_output"] / line["scale"] for line in lines)
    print(json.dumps({"n_round_trips": len(lines), **largest, "relative_to_scale": relative}))


def _printed(lines: Iterator[dict[str, Any]]) -> list[dict[str, Any]]:
    found = []
    for line in lines:
        print(json.dumps(line), flush=True)
        found.append(line)
    return found


if __name__ == "__main__":
    main()
