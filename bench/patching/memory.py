"""Peak resident memory of one head sweep, by each library in a process of its own that does nothing else."""

import subprocess
import sys

from bench.harvest.memory import peak_resident_bytes
from bench.patching.model import Sizes, random_model, random_pairs

_SHARED = 10
WAYS = ("loaded", "ours", "transformer_lens")


def peaks() -> dict[str, int]:
    """Return the peak in MB of each way; `loaded` has the model and both libraries in memory and sweeps nothing."""
    return {way: _peak(way) for way in WAYS}


def _peak(way: str) -> int:
    command = [sys.executable, "-m", "bench.patching.memory", way]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    if found.returncode != 0:
        raise RuntimeError(found.stderr[-2000:])
    return round(int(found.stdout.splitlines()[-1]) / 1e6)


def main(way: str) -> None:
    """Sweep once and print the peak: what the child does."""
    from bench.patching.subjects import Sweep, TransformerLensSweep

    sizes = Sizes()
    model, group = random_model(sizes), random_pairs(sizes, _SHARED)
    assert model.bridge is not None, "both ways hold the bridge"
    if way == "ours":
        Sweep(model, group, "head_out").turn()
    elif way == "transformer_lens":
        TransformerLensSweep(model, group, "head_out", range(sizes.n_layers)).turn()
    print(peak_resident_bytes())


if __name__ == "__main__":
    main(sys.argv[1])
