"""Trains SAELens' TopK SAE once on given rows, in their order, and reconstructs held-out rows with it.

Run by the python of a virtual environment that has SAELens (and no mi_pipe).
"""

import json
import sys
from collections.abc import Iterator

import numpy as np
import torch
from sae_lens import LoggingConfig, SAETrainer, TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.config import SAETrainerConfig

_DEFAULT_LR = 3e-4
_NORM_BATCHES = 16


def main() -> None:
    """Train, reconstruct, and print learning rate and number of active features."""
    asked = json.loads(sys.argv[1])
    torch.set_num_threads(asked["n_threads"])
    torch.manual_seed(0)
    rows, n_batch, lr = np.load(asked["rows"], mmap_mode="r"), asked["batch_rows"], asked["lr"] or _DEFAULT_LR

    def batches() -> Iterator[torch.Tensor]:
        # The first batches are read once more for the estimate of the norm.
        for number in (*range(min(_NORM_BATCHES, asked["n_steps"])), *range(asked["n_steps"])):
            yield torch.from_numpy(rows[number * n_batch : (number + 1) * n_batch].copy())

    sae = TopKTrainingSAE(
        TopKTrainingSAEConfig(
            d_in=rows.shape[1],
            d_sae=asked["d_sae"],
            k=asked["k"],
            device="cpu",
            normalize_activations="expected_average_only_in",
        )
    )
    config = SAETrainerConfig(
        total_training_samples=asked["n_steps"] * n_batch,
        train_batch_size_samples=n_batch,
        lr=lr,
        lr_end=lr / 10,
        n_batches_for_norm_estimate=min(_NORM_BATCHES, asked["n_steps"]),
        logger=LoggingConfig(log_to_wandb=False),
    )
    sae = SAETrainer(cfg=config, sae=sae, data_provider=batches()).fit().eval()
    held_out, out, n_active = torch.from_numpy(np.load(asked["held_out"])), [], 0
    with torch.no_grad():
        for x in held_out.split(n_batch):
            z = sae.encode(x)
            n_active += int(torch.count_nonzero(z))
            out.append(sae.decode(z).numpy())
    np.save(asked["reconstruction"], np.concatenate(out))
    print(json.dumps({"lr": lr, "n_active": n_active}))


if __name__ == "__main__":
    main()
