"""SAELens' SAETrainer with its defaults, run by the python of a virtual environment that has it (and no mi_pipe)."""

import contextlib

from sae_lens import (
    BatchTopKTrainingSAE,
    BatchTopKTrainingSAEConfig,
    JumpReLUTrainingSAE,
    JumpReLUTrainingSAEConfig,
    LoggingConfig,
    SAETrainer,
    StandardTrainingSAE,
    StandardTrainingSAEConfig,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
)
from sae_lens.config import SAETrainerConfig
from turns import Turns

_ENDLESS = 10**12


def make(architecture: str, d_in: int, d_sae: int, k: int):
    """Return an SAE as SAELens makes it by default, as sparse as ours."""
    sizes = {"d_in": d_in, "d_sae": d_sae, "device": "cpu"}
    if architecture == "topk":
        return TopKTrainingSAE(TopKTrainingSAEConfig(k=k, **sizes))
    if architecture == "batchtopk":
        return BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(k=float(k), **sizes))
    if architecture == "jumprelu":
        target = {"jumprelu_sparsity_loss_mode": "quadratic", "target_l0": float(k)}
        return JumpReLUTrainingSAE(JumpReLUTrainingSAEConfig(**target, **sizes))
    return StandardTrainingSAE(StandardTrainingSAEConfig(**sizes))


def main() -> None:
    """Train for as long as turns come."""
    turns = Turns()
    asked = turns.options
    sae = make(asked["architecture"], turns.rows.shape[1], asked["d_sae"], asked["k"])
    config = SAETrainerConfig(
        total_training_samples=_ENDLESS,
        train_batch_size_samples=asked["batch_rows"],
        lr_end=3e-5,
        logger=LoggingConfig(log_to_wandb=False),
    )
    # The trainer takes batches by next() and does not expect them to end.
    with contextlib.suppress(StopIteration):
        SAETrainer(cfg=config, sae=sae, data_provider=turns.batches()).fit()


if __name__ == "__main__":
    main()
