"""The peak memory of one whole harvest of a small random model, in a process that does nothing else."""

import subprocess
import sys
from pathlib import Path

from bench.harvest.models import Sizes, save_model
from bench.harvest.prompts import publish_prompts, random_tokens
from mi_pipe.core.stage import execute
from mi_pipe.core.store import Store
from mi_pipe.models.handle import resolve_model
from mi_pipe.prompts.prompt_set import PromptSet
from stages.harvest import STAGE, HarvestConfig, Inputs

_SHARD_ROWS = 4096
_N_CTX = 128
_D_VOCAB = 1000


def peak_bytes(n_tokens: int, folder: Path) -> int:
    """Harvest `n_tokens` tokens in a child process below `folder`; return its peak resident memory."""
    store = Store(folder / "store")
    model = save_model(folder / "hf", Sizes(n_layers=1, d_model=256, n_heads=4, d_vocab=_D_VOCAB))
    prompts = publish_prompts(store, random_tokens(n_tokens // _N_CTX, _N_CTX, _D_VOCAB), _D_VOCAB)
    command = [sys.executable, "-m", "bench.harvest.memory", str(store.root), str(model), str(prompts.path)]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    if found.returncode != 0:
        raise RuntimeError(found.stderr[-2000:])
    return int(found.stdout.splitlines()[-1])


def main(store: str, model: str, prompts: str) -> None:
    """Run the harvest stage and print the peak: what the child does."""
    config = HarvestConfig(hooks=["blocks.0.hook_resid_post"], shard_rows=_SHARD_ROWS, device="cpu")
    inputs = Inputs(resolve_model(model, Store(store), device="cpu"), PromptSet(Path(prompts)))
    execute(STAGE, config, inputs, Store(store))
    print(peak_resident_bytes())


def peak_resident_bytes() -> int:
    """Return the peak resident memory of this process."""
    # Not getrusage: its maximum begins with the memory of the process that started this one.
    status = Path("/proc/self/status").read_text()
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:"))


if __name__ == "__main__":
    main(*sys.argv[1:])
