"""Prompts of random tokens, all of one length, as a published prompt set."""

import numpy as np
import pandas as pd
from jaxtyping import Int

from mi_pipe.core.manifest import MadeOf
from mi_pipe.core.store import Store
from mi_pipe.core.workspace import Workspace
from mi_pipe.prompts.prompt_set import DROPPED_FILE, PROMPTS_FILE, TOKENS_FILE, PromptSet


def random_tokens(n_prompts: int, n_ctx: int, d_vocab: int) -> Int[np.ndarray, "prompt pos"]:
    """Return tokens without 0, which is BOS."""
    return np.random.default_rng(0).integers(1, d_vocab, (n_prompts, n_ctx)).astype(np.int32)


def publish_prompts(store: Store, tokens: Int[np.ndarray, "prompt pos"], d_vocab: int) -> PromptSet:
    """Publish the prompts; token 7 is written w7."""
    n_prompts, n_ctx = tokens.shape
    name = "generate_prompts-bench"
    work = Workspace(name, store.folder(name), store.scratch(name))
    columns = {
        "prompt_idx": np.repeat(np.arange(n_prompts, dtype=np.int32), n_ctx),
        "pos": np.tile(np.arange(n_ctx, dtype=np.int32), n_prompts),
        "token_id": tokens.reshape(-1),
        "text": pd.Categorical.from_codes(tokens.reshape(-1), [f"w{i}" for i in range(d_vocab)]),
    }
    prompts = {"prompt_idx": np.arange(n_prompts, dtype=np.int32), "n_tokens": np.full(n_prompts, n_ctx, np.int32)}
    work.write_table(TOKENS_FILE, pd.DataFrame(columns))
    work.write_table(PROMPTS_FILE, pd.DataFrame({**prompts, "source": "random"}))
    work.write_json(DROPPED_FILE, {})
    work.publish(MadeOf("generate_prompts", 1, {"family": "corpus"}))
    return PromptSet(work.folder)
