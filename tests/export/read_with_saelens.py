"""Run by a Python with SAELens: read an export through its ActivationsStore; save raw batches and training batches.

read_with_saelens.py FOLDER HOOK CONTEXT_SIZE D_IN OUT.npz
"""

import sys
import warnings

import numpy as np
import torch

warnings.filterwarnings("ignore")
from sae_lens.training.activations_store import ActivationsStore  # noqa: E402

folder, hook, context_size, d_in, out = sys.argv[1:]
assert "mi_pipe" not in sys.modules
store = ActivationsStore(
    model=None,
    dataset=None,
    streaming=False,
    hook_name=hook,
    hook_head_index=None,
    context_size=int(context_size),
    d_in=int(d_in),
    n_batches_in_buffer=4,
    total_training_tokens=10**6,
    store_batch_size_prompts=5,
    train_batch_size_tokens=50,
    prepend_bos=False,
    normalize_activations="none",
    device=torch.device("cpu"),
    dtype="float32",
    cached_activations_path=folder,
)
n_prompts = len(store.cached_activation_dataset)
raw, token_ids = zip(*[store.get_raw_llm_batch() for _ in range(n_prompts // 5)], strict=True)
# The training batches of one epoch: SAELens mixes them in a buffer, so they come in another order.
store.current_row_idx = 0
store.activations_mixing_fraction = 0.0
n_batches = n_prompts * int(context_size) // 50
batches = [next(store) for _ in range(n_batches)]
np.savez(
    out,
    raw=torch.cat(raw).float().numpy(),
    token_ids=torch.cat(token_ids).numpy(),
    batches=torch.cat([batch.reshape(50, -1) for batch in batches]).float().numpy(),
)
