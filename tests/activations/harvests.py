"""Prompt sets of any lengths, and harvests of toys: what the tests of the activation store read."""

import hashlib
import os

import numpy as np
import pandas as pd

from mi_pipe.activations.store import ActivationStore
from mi_pipe.core.stage import execute
from mi_pipe.core.store import Store
from mi_pipe.prompts.prompt_set import PromptSet
from stages import harvest
from tests.stages.toys import _prompt_set, toy_model

RESIDUAL, HEADS = "blocks.0.hook_resid_post", "blocks.1.attn.hook_z"


def random_prompts(store: Store, lengths: list[int], d_vocab: int = 64, seed: int = 0) -> PromptSet:
    """Publish prompts of random tokens with the given lengths; the first `d_vocab` begin with different tokens."""
    rng = np.random.default_rng(seed)
    prompts = [np.append(i % d_vocab, rng.integers(0, d_vocab, n - 1)) for i, n in enumerate(lengths)]
    frame = pd.DataFrame({"n_tokens": lengths, "source": "random"})
    name = hashlib.sha256(repr((lengths, d_vocab, seed)).encode()).hexdigest()[:16]
    return _prompt_set(store, name, "corpus", prompts, frame)


def harvest_toy(store: Store, lengths: list[int], **fields) -> ActivationStore:
    """Harvest two hook points of the toy on random prompts."""
    config = {"hooks": [RESIDUAL, HEADS], "shard_rows": 64, "batch_tokens": 96, "device": "cpu", **fields}
    inputs = harvest.Inputs(toy_model(store), random_prompts(store, lengths))
    return ActivationStore(execute(harvest.STAGE, harvest.HarvestConfig(**config), inputs, store).artifact.path)


def tree_hashes(store: ActivationStore) -> dict[str, str]:
    """Return the SHA-256 of every file but the manifest, which holds times."""
    files = (path for path in store.path.rglob("*") if path.is_file() and path.name != "manifest.json")
    return {os.fspath(path.relative_to(store.path)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
