"""A toy with its residual stream harvested in float32, and a task for it."""

from mi_pipe.activations.store import ActivationStore
from mi_pipe.core.stage import execute
from mi_pipe.core.store import Store
from mi_pipe.models.trained import TrainedModel
from mi_pipe.prompts.prompt_set import PromptSet
from mi_pipe.prompts.repeated import RepeatedConfig
from stages import generate_prompts, harvest
from stages.lenses import Inputs, LensesConfig
from tests.stages.toys import toy_model, toy_task

LAST = "blocks.1.hook_resid_post"
HOOKS = ["blocks.0.hook_resid_pre", "blocks.0.hook_resid_post", LAST]
TUNED = {
    "n_steps": 30,
    "batch_rows": 256,
    "checkpoint_steps": 10,
    "lr": 0.01,
    "validation_fraction": 0.15,
    "held_out_fraction": 0.2,
}


def lens_inputs(store: Store, with_last: bool = True) -> Inputs:
    """Return a toy, a task of pairs of two lengths, and activations with or without those of the last layer."""
    model = TrainedModel(toy_model(store, attn_only=False).path)
    corpus = RepeatedConfig(n_prompts=60, length=24, max_period=12)
    prompts = PromptSet(execute(generate_prompts.STAGE, corpus, generate_prompts.Inputs(model), store).artifact.path)
    hooks = HOOKS if with_last else HOOKS[:-1]
    wanted = harvest.HarvestConfig(hooks=hooks, precision="float32", device="cpu", store_dtype="float32")
    acts = ActivationStore(execute(harvest.STAGE, wanted, harvest.Inputs(model, prompts), store).artifact.path)
    return Inputs(model, [toy_task(store, model)], acts, prompts)


def lens_config(**changes) -> LensesConfig:
    """Return a config that reads five prompts and trains for a moment."""
    return LensesConfig(**{"max_prompts": 5, "n_top": 3, "tuned": TUNED, "device": "cpu", **changes})
