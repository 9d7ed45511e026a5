"""The inputs of `train_saes` on a toy, by the real stages before it; run as a program it trains and can be killed."""

import logging
import sys
import time

import torch

from mi_pipe.activations.store import ActivationStore
from mi_pipe.core.stage import execute
from mi_pipe.core.store import Store
from mi_pipe.models.trained import TrainedModel
from mi_pipe.prompts.prompt_set import PromptSet
from mi_pipe.prompts.repeated import RepeatedConfig
from mi_pipe.saes.config import TrainSAEsConfig
from mi_pipe.saes.trainer import SAETrainer
from stages import generate_prompts, harvest, train_saes
from tests.stages.toys import toy_model

FIRST, SECOND = "blocks.0.hook_resid_post", "blocks.1.hook_resid_post"


def sae_inputs(store: Store) -> train_saes.Inputs:
    """Return a toy model, a corpus for it, and activations of two hook points."""
    model = TrainedModel(toy_model(store).path)
    corpus = RepeatedConfig(n_prompts=80, length=40, max_period=12)
    prompts = PromptSet(execute(generate_prompts.STAGE, corpus, generate_prompts.Inputs(model), store).artifact.path)
    wanted = harvest.HarvestConfig(hooks=[FIRST, SECOND], precision="float32", device="cpu", store_dtype="float32")
    harvested = execute(harvest.STAGE, wanted, harvest.Inputs(model, prompts), store)
    return train_saes.Inputs(model, prompts, ActivationStore(harvested.artifact.path))


def toy_config(**changes) -> TrainSAEsConfig:
    """Return a sweep of four SAEs: two hook points, two architectures."""
    fields = {
        "architecture": ["topk", "batchtopk"],
        "d_sae": 64,
        "k": 4,
        "n_tokens": 256 * 60,
        "batch_rows": 256,
        "log_steps": 10,
        "data": {"held_out_fraction": 0.1, "pool_rows": 1024},
        "evaluation": {"n_prompts": 6},
        "checkpoint_s": 0,
        "device": "cpu",
    }
    return TrainSAEsConfig(**{**fields, **changes})


def slow_steps(seconds: float) -> None:
    """Make every training step take longer, so that a kill has something to hit."""
    step = SAETrainer.step

    def slow_step(self, x, index):
        print("step", index, flush=True)
        time.sleep(seconds)
        return step(self, x, index)

    SAETrainer.step = slow_step


if __name__ == "__main__":
    torch.set_num_threads(1)
    logging.basicConfig(level=logging.WARNING)
    store = Store(sys.argv[1])
    inputs = sae_inputs(store)
    slow_steps(float(sys.argv[2]))
    execute(train_saes.STAGE, toy_config(checkpoint_s=float(sys.argv[3])), inputs, store)
