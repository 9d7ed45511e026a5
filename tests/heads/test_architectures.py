"""The whole stage on models of other layouts, against transformers' own eager attention and plain head-by-head sums."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from mi_pipe.attention.head_scores import HeadScores
from mi_pipe.attention.repeats import repeated_sequences
from mi_pipe.core.stage import execute
from mi_pipe.core.store import Store
from mi_pipe.heads.random_sequences import random_sequences
from mi_pipe.models.handle import resolve_model
from mi_pipe.models.loading import read_vocabulary
from mi_pipe.models.source import source_hooks
from stages.heads import STAGE, HeadsConfig, Inputs
from tests.patching.conftest import HF_CONFIGS, word_tokenizer
from tests.stages.toys import toy_task

NAMES = ["neox", "gemma2", "qwen3"]
PLACES = {"io": 1, "s1": 2, "s2": 4, "end": -1}
CONFIG = HeadsConfig(n_sequences=2, period=6, prefix_period=4, n_pattern_prompts=1, name_pairs=2, device="cpu")


class Run:
    """One model: its artifact, its task, and the same weights in plain transformers."""

    def __init__(self, name: str, folder) -> None:
        torch.manual_seed(11)
        AutoModelForCausalLM.from_config(HF_CONFIGS[name]).save_pretrained(folder / "model")
        word_tokenizer().save_pretrained(folder / "model")
        store = Store(folder / "store")
        self.plain = AutoModelForCausalLM.from_pretrained(folder / "model", attn_implementation="eager").eval()
        self.source = resolve_model(str(folder / "model"), store, device="cpu")
        self.task = toy_task(store, self.source, n_pairs=4, places=PLACES)  # pyright: ignore[reportArgumentType]
        inputs = Inputs(model=self.source, tasks=[self.task])
        self.heads = HeadScores(execute(STAGE, CONFIG, inputs, store).artifact.path)

    @torch.no_grad()
    def attentions(self, tokens) -> np.ndarray:
        """(layer, batch, head, query, key)."""
        return torch.stack(self.plain(tokens, output_attentions=True).attentions).double().numpy()


@pytest.fixture(scope="module", params=NAMES)
def run(request, tmp_path_factory) -> Run:
    return Run(request.param, tmp_path_factory.mktemp(request.param))


def test_nothing_is_refused(run):
    assert run.heads.refused == {}
    scores = run.heads.scores()
    assert np.isfinite(scores.to_numpy()).all()
    assert {"name_copying", "sequence_copying", "full_ov_eigenvalue_copying"} <= set(run.heads.score_names)
    assert run.heads.attributed_tasks == ["ioi"]


def test_diagonals_and_prefix_matching_are_those_of_transformers_attention(run):
    vocabulary, info = read_vocabulary(run.source), source_hooks(run.source)[1]
    pattern = run.attentions(repeated_sequences(vocabulary, info, 2, 6, CONFIG.seed))
    for score, lag in (("previous_token", 1), ("duplicate_token", 6), ("induction", 5)):
        expected = pattern.diagonal(-lag, axis1=-2, axis2=-1).mean((1, -1))
        np.testing.assert_allclose(run.heads.grid(score), expected, atol=1e-5)
    sequences = random_sequences(vocabulary, info, 2, 4, CONFIG.seed)
    pattern, tokens = run.attentions(sequences.tokens), sequences.tokens.numpy()
    follows = np.zeros(pattern.shape[-2:], bool)
    for query in range(4, 16):
        follows[query, [k + 1 for k in range(query) if tokens[0, k] == tokens[0, query]]] = True
    expected = (pattern * follows).sum(-1)[..., 4:].mean((1, -1))
    np.testing.assert_allclose(run.heads.grid("prefix_matching"), expected, atol=1e-5)


def test_attention_between_places_and_stored_patterns_are_those_of_transformers(run):
    found = run.heads.attention("ioi")
    for group in run.task.pair_groups():
        pattern = run.attentions(group.clean).swapaxes(0, 1)
        cells = found.sel(pair=group.pairs)
        np.testing.assert_allclose(cells["places"].sel({"from": "end", "to": "io"}), pattern[..., -1, 1], atol=1e-5)
        entropy = -(pattern * np.log(np.maximum(pattern, 1e-30))).sum(-1).mean(-1)
        np.testing.assert_allclose(cells["habits"].sel(habit="attention_entropy"), entropy, atol=1e-5)
    stored = run.heads.pattern("ioi")[0].to_numpy()
    n_pos = np.isfinite(stored[0, 0, :, 0]).sum()
    tokens = torch.from_numpy(run.task.prompt(0).astype(np.int64))[None]
    np.testing.assert_allclose(stored[..., :n_pos, :n_pos], run.attentions(tokens)[:, 0], atol=6e-4)


def test_contributions_sum_to_the_logit_difference_of_transformers(run):
    found = run.heads.attribution("ioi")
    cap = getattr(run.plain.config, "final_logit_softcapping", None)
    by_layer = found["heads"].sum("head") + found["attn_bias"] + found["mlps"]
    total = by_layer.sum("layer") + found["embed"] + found["pos_embed"] + found["bias"]
    for group in run.task.pair_groups():
        with torch.no_grad():
            logits = run.plain(group.clean).logits[:, -1].double()
        logits = cap * torch.atanh(logits / cap) if cap else logits
        rows = torch.arange(group.n_pairs)
        expected = logits[rows, group.answer] - logits[rows, group.wrong]
        np.testing.assert_allclose(total.sel(pair=group.pairs), expected, atol=2e-4 * float(logits.abs().max()))
