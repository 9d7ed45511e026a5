"""The inputs of `score_features` on a toy: stored activations of two hook points and three SAEs with random weights."""

import os
import sys

import pandas as pd
import torch

from mi_pipe.activations.store import ActivationStore
from mi_pipe.core.stage import execute
from mi_pipe.core.store import Store
from mi_pipe.features import latents
from mi_pipe.models.trained import TrainedModel
from mi_pipe.prompts.prompt_set import PromptSet
from mi_pipe.prompts.repeated import RepeatedConfig
from mi_pipe.saes.inference import InferenceRule
from mi_pipe.saes.sae import SAE
from mi_pipe.saes.sae_set import CONFIG_FILE, EVALUATION_FILE, PROBE_FILE, WEIGHTS_FILE, SAESet
from mi_pipe.saes.storage import make_probe, sae_config, sae_tensors
from stages import generate_prompts, harvest, score_features
from stages.score_features import ScoreFeaturesConfig
from tests.stages.toys import publish, toy_model

RESIDUAL, HEADS = "blocks.0.hook_resid_post", "blocks.1.attn.hook_z"
D_IN, D_SAE, DEAD = 32, 48, 5
CONFIG = ScoreFeaturesConfig(
    n_top=3, n_quantiles=2, n_per_quantile=2, context_before=3, context_after=2, n_bins=8, n_logits=4, device="cpu"
)


def small_units() -> None:
    """Make blocks and feature ranges small enough that the toy has several of each."""
    latents.BLOCK_ROWS = 512
    latents.MAX_FIRINGS = 3_000


def scored_inputs(store: Store) -> score_features.Inputs:
    """Make what the stage reads, by the real stages but for the SAEs."""
    model = TrainedModel(toy_model(store).path)
    corpus = RepeatedConfig(n_prompts=60, length=30, max_period=12)
    prompts = PromptSet(execute(generate_prompts.STAGE, corpus, generate_prompts.Inputs(model), store).artifact.path)
    harvesting = harvest.HarvestConfig(
        hooks=[RESIDUAL, HEADS], precision="float32", store_dtype="float32", massive_factor=1.3, device="cpu"
    )
    harvested = execute(harvest.STAGE, harvesting, harvest.Inputs(model, prompts), store)
    activations = ActivationStore(harvested.artifact.path)
    return score_features.Inputs(model, prompts, activations, toy_saes(store))


def toy_saes(
    store: Store, name: str = "0" * 16, hooks: tuple[str, str] = (RESIDUAL, HEADS), d_in: int = D_IN
) -> SAESet:
    """Publish a TopK and a threshold SAE at the first hook point and a TopK SAE at the second."""
    topk, threshold = InferenceRule("topk", k=4), InferenceRule("threshold", threshold=torch.tensor(2.0))
    saes = [
        _random_sae("first.topk", hooks[0], topk, d_in, 0),
        _random_sae("first.threshold", hooks[0], threshold, d_in, 1),
        _random_sae("second.topk", hooks[1], topk, d_in, 2),
    ]

    def fill(work) -> None:
        probes = {sae.name: make_probe(sae, torch.randn(4, d_in, generator=torch.Generator())) for sae in saes}
        for sae in saes:
            work.write_json(f"saes/{sae.name}/{CONFIG_FILE}", sae_config(sae, 0, probes[sae.name]))
            work.write_tensors(f"saes/{sae.name}/{WEIGHTS_FILE}", sae_tensors(sae))
        work.write_tensors(PROBE_FILE, {f"{n}.{part}": x for n, probe in probes.items() for part, x in probe.items()})
        work.write_table(EVALUATION_FILE, pd.DataFrame({"sae": [sae.name for sae in saes], "l0": 4.0}))

    return SAESet(publish(store, "train_saes", name, fill, {}))


def _random_sae(name: str, hook: str, rule: InferenceRule, d_in: int, seed: int) -> SAE:
    generator = torch.Generator().manual_seed(seed)
    bias = torch.zeros(D_SAE)
    bias[DEAD] = -1e6
    weights = torch.randn(D_SAE, d_in, generator=generator)
    return SAE(weights.T.contiguous(), bias, weights, torch.zeros(d_in), rule, hook, rule.kind, name)


def main(root: str, n_units: int) -> None:
    """Score in this process, and die without warning after `n_units` units."""
    small_units()
    inputs = scored_inputs(Store(root))
    mark = score_features._Job.mark

    def mark_and_die(job, *unit) -> None:
        mark(job, *unit)
        if job.work.ledger.n_done >= n_units:
            os.kill(os.getpid(), 9)

    score_features._Job.mark = mark_and_die
    execute(score_features.STAGE, CONFIG, inputs, Store(root))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
