"""dictionary_learning's trainSAE with its TopK trainer, run by the python of a virtual environment that has it."""

from dictionary_learning.trainers.top_k import AutoEncoderTopK, TopKTrainer
from dictionary_learning.training import trainSAE
from turns import Turns

_ENDLESS = 10**9


def main() -> None:
    """Train for as long as turns come."""
    turns = Turns()
    asked = turns.options
    config = {
        "trainer": TopKTrainer,
        "dict_class": AutoEncoderTopK,
        "activation_dim": turns.rows.shape[1],
        "dict_size": asked["d_sae"],
        "k": asked["k"],
        "steps": _ENDLESS,
        "warmup_steps": 1000,
        "layer": 0,
        "lm_name": "none",
        "device": "cpu",
        "seed": 0,
    }
    trainSAE(turns.batches(), trainer_configs=[config], steps=_ENDLESS, device="cpu", use_wandb=False)


if __name__ == "__main__":
    main()
