"""Published artifacts for stage tests: a native toy with random weights, a task of pairs of two lengths, a corpus."""

import numpy as np
import pandas as pd

from mi_pipe.core.manifest import MadeOf
from mi_pipe.core.store import Store
from mi_pipe.core.workspace import Workspace
from mi_pipe.models.trained import CONFIG_FILE, WEIGHTS_FILE, TrainedModel, native_module
from mi_pipe.models.vocabulary import NumberVocabulary
from mi_pipe.prompts.prompt_set import DROPPED_FILE, PROMPTS_FILE, TOKENS_FILE, PromptSet

LENGTHS = (6, 8)


def publish(store: Store, stage: str, name: str, fill, config: dict) -> Workspace:
    """Publish an artifact of `stage` whose files `fill(work)` writes, once."""
    artifact_id = f"{stage}-{name}"
    if not store.is_published(artifact_id):
        work = Workspace(artifact_id, store.folder(artifact_id), store.scratch(artifact_id))
        fill(work)
        work.publish(MadeOf(stage, 1, config))
    return store.folder(artifact_id)


def toy_model(store: Store, d_vocab: int = 64, n_ctx: int = 64, attn_only: bool = True) -> TrainedModel:
    """Return a two-layer rotary toy whose attention is far from uniform."""
    fields = {
        "n_layers": 2,
        "d_model": 32,
        "n_heads": 4,
        "d_head": 8,
        "d_mlp": 64,
        "n_ctx": n_ctx,
        "d_vocab": d_vocab,
        "attn_only": attn_only,
        "act_fn": "relu",
        "normalization_type": "LN",
        "positional_embedding_type": "rotary",
        "seed": 3,
    }

    def fill(work: Workspace) -> None:
        weights = native_module(fields).state_dict()
        work.write_json(CONFIG_FILE, fields)
        work.write_tensors(WEIGHTS_FILE, {k: v * 4 if v.ndim > 1 else v for k, v in weights.items()})

    name = f"{d_vocab:08x}{n_ctx:06x}{int(attn_only):02x}"
    return TrainedModel(publish(store, "train_model", name, fill, fields))


def toy_task(
    store: Store, model: TrainedModel, n_pairs: int = 7, seed: int = 0, places: dict[str, int] | None = None
) -> PromptSet:
    """Return pairs of random tokens of two lengths that differ from position 2 on.

    With `places` (name to position) it is a task of family `ioi`.
    """
    rng = np.random.default_rng(seed)
    prompts, rows = [], []
    for pair in range(n_pairs):
        n = LENGTHS[pair % len(LENGTHS)]
        clean = rng.integers(1, 64, n)
        corrupted = clean.copy()
        corrupted[2:] = (clean[2:] + rng.integers(1, 60, n - 2)) % 64
        for role, tokens in (("clean", clean), ("corrupted", corrupted)):
            rows.append({"role": role, "pair": pair, "n_tokens": n, "source": "toy"})
            prompts.append(tokens)
    answers = np.repeat(rng.integers(0, 64, n_pairs), 2)
    frame = pd.DataFrame(rows).assign(answer_id=answers, wrong_id=(answers + 9) % 64)
    frame["answer"] = [f" {i}" for i in frame["answer_id"]]
    frame["wrong"] = [f" {i}" for i in frame["wrong_id"]]
    for name, position in (places or {}).items():
        frame[f"pos_{name}"] = pd.array([position if position >= 0 else n - 1 for n in frame["n_tokens"]], "Int32")
    family = "ioi" if places else "induction"
    return _prompt_set(store, f"{int(bool(places))}{seed:07x}{n_pairs:08x}", family, prompts, frame)


def toy_corpus(store: Store, model: TrainedModel) -> PromptSet:
    """Return a prompt set without pairs."""
    prompts = [np.arange(8), np.arange(8)[::-1]]
    frame = pd.DataFrame({"n_tokens": [8, 8], "source": ["toy", "toy"]})
    return _prompt_set(store, "c" * 16, "corpus", prompts, frame)


def _prompt_set(store: Store, name: str, family: str, prompts: list[np.ndarray], frame: pd.DataFrame) -> PromptSet:
    vocabulary = NumberVocabulary(64)
    ids = np.concatenate(prompts).astype(np.int32)
    tokens = pd.DataFrame(
        {
            "prompt_idx": np.repeat(np.arange(len(prompts)), [len(p) for p in prompts]).astype(np.int32),
            "pos": np.concatenate([np.arange(len(p)) for p in prompts]).astype(np.int32),
            "token_id": ids,
            "text": pd.Categorical([vocabulary.text(i) for i in ids]),
        }
    )
    numbers = {name: frame[name].astype(np.int32) for name in frame if frame[name].dtype.kind == "i"}
    frame = frame.assign(**numbers)
    frame.insert(0, "prompt_idx", np.arange(len(frame), dtype=np.int32))

    def fill(work: Workspace) -> None:
        work.write_table(TOKENS_FILE, tokens)
        work.write_table(PROMPTS_FILE, frame)
        work.write_json(DROPPED_FILE, {})

    return PromptSet(publish(store, "generate_prompts", name, fill, {"family": family}))
