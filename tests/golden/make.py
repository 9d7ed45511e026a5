"""Makes the golden store of the present version: `python -m tests.golden.make`, once, when the version is raised.

Facts of the host are left out of its manifest. A golden store is never made again: an old one has to stay readable.
"""

import os
import shutil
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from mi_pipe.activations import layout
from mi_pipe.activations.group import SCHEMA
from mi_pipe.core.manifest import write_manifest
from mi_pipe.core.store import Store
from tests.activations.harvests import harvest_toy

LENGTHS = [20, 20, 33, 7, 7, 20, 41, 1, 23]
CHUNK_BYTES = 1024


def main() -> None:
    folder = Path(__file__).parent / f"v{SCHEMA.rpartition('/')[2]}"
    if folder.exists():
        sys.exit(f"{folder} exists; raise the version in mi_pipe/activations/group.py and data/README.md first.")
    torch.set_num_threads(1)
    layout._CHUNK_BYTES = CHUNK_BYTES
    with tempfile.TemporaryDirectory() as root:
        acts = harvest_toy(Store(root), LENGTHS, shard_rows=64, batch_tokens=96, precision="float32")
        made = folder / acts.id
        shutil.copytree(acts.path, made)
        write_manifest(made, acts.manifest.model_copy(update={"host": {}}))
    for path in folder.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    print(f"Made {made}: add what it holds to tests/golden/test_golden.py.")


if __name__ == "__main__":
    main()
