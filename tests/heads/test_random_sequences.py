import numpy as np
import pytest
import torch

from mi_pipe.heads.random_sequences import Sequences, copying, measure_random, prefix_matching, random_sequences
from mi_pipe.models.head_weights import head_weights
from tests.circuits.tiny import D_VOCAB, model
from tests.heads.patterns import induction_pattern, previous_pattern, spread_induction_pattern

PERIOD, N_POS = 5, 20


def test_perfect_induction_heads_match_prefixes():
    patterns = [induction_pattern, spread_induction_pattern]
    stacked = torch.stack([make(PERIOD, N_POS) for make in patterns] + [previous_pattern(N_POS)])
    scores = prefix_matching(stacked[None], PERIOD)[0]
    assert scores[:2].tolist() == pytest.approx([1.0, 1.0])
    assert scores[2] == 0


def test_prefix_matching_of_uniform_attention_is_counted_by_hand():
    uniform = torch.ones(N_POS, N_POS).tril()
    uniform = uniform / uniform.sum(-1, keepdim=True)
    expected = np.mean([(query // PERIOD) / (query + 1) for query in range(PERIOD, N_POS)])
    assert prefix_matching(uniform[None, None], PERIOD).item() == pytest.approx(expected)


def test_copying_of_a_worked_example():
    # Position 1 may attend to two tokens: logits 3 and 1, mean 2, raised 1 and 0. Position 2: 0, 3, 6; raised 0, 0, 3.
    logits = torch.tensor([[9.0, 9, 9], [3, 1, 9], [0, 3, 6]])[None, None]
    assert copying(logits, torch.tensor([[[0, 0, 2]]])).item() == pytest.approx(1.0)
    assert copying(logits, torch.tensor([[[0, 1, 2]]])).item() == pytest.approx(0.0)
    assert copying(logits, torch.tensor([[[0, 1, 1]]])).item() == pytest.approx(-1.0)


def test_sequences_are_blocks_written_four_times_of_neither_rare_nor_common_tokens():
    here = model("gpt2")
    found = random_sequences(here.vocabulary, here.info, 6, 25, seed=0)
    assert found.period == here.info.n_ctx // 4
    assert bool((found.tokens.view(6, 4, -1) == found.tokens[:, None, : found.period]).all())
    n_excluded = int(0.04 * (D_VOCAB - 3))
    assert int(found.tokens.min()) >= 3 + n_excluded
    assert int(found.tokens.max()) < D_VOCAB - n_excluded
    assert all(len(set(row)) == found.period for row in found.tokens[:, : found.period].tolist())


@pytest.mark.parametrize("name", ["gpt2", "neox", "llama_gqa", "gemma2", "qwen3", "native_attn_only"])
def test_scores_equal_a_loop_over_heads_and_positions(name):
    here = model(name)
    sequences = random_sequences(here.vocabulary, here.info, 2, 4, seed=1)
    found = measure_random(here, sequences)
    _, cache = here.bridge.run_with_cache(sequences.tokens)
    scale = final_weight(here)
    for layer in range(here.info.n_layers):
        pattern, z = cache[f"blocks.{layer}.attn.hook_pattern"], cache[f"blocks.{layer}.attn.hook_z"]
        written = torch.einsum(
            "bphk,hkm->bphm", z.reshape(*z.shape[:2], here.info.n_heads, -1), head_weights(here, layer).W_O
        )
        written = written * post_weight(here, layer)
        for row, tokens in enumerate(sequences.tokens.tolist()):
            for head in range(here.info.n_heads):
                prefix, shares = [], []
                for query in range(16):
                    after = [k for k in range(1, query + 1) if tokens[k - 1] == tokens[query] and k - 1 < query]
                    prefix += [sum(pattern[row, head, query, k].item() for k in after)] if query >= 4 else []
                    seen = list(dict.fromkeys(tokens[: query + 1]))
                    logits = centred(here, written[row, query, head]) * scale @ here.W_U[:, seen]
                    raised = (logits - logits.mean()).clamp_min(0)
                    best = seen.index(tokens[int(pattern[row, head, query].argmax())])
                    shares += [2 * (raised[best] / raised.sum()).item() - 1] if query else []
                assert found[row, layer, head, 0] == pytest.approx(np.mean(prefix), abs=1e-6)
                assert found[row, layer, head, 1] == pytest.approx(np.mean(shares), abs=1e-4)


def test_scores_do_not_depend_on_batches():
    here = model("llama_gqa")
    whole = random_sequences(here.vocabulary, here.info, 3, 4, seed=1)
    parts = [measure_random(here, Sequences(part, 4)) for part in whole.tokens.split(1)]
    np.testing.assert_allclose(measure_random(here, whole), np.concatenate(parts), atol=1e-6)


def final_weight(here):
    weight = getattr(here.final_norm, "weight", None)
    return 1 + weight if "Gemma" in type(here.final_norm).__name__ else weight


def post_weight(here, layer):
    name = f"blocks.{layer}.ln1_post.hook_in"
    return 1 + here.submodule(here.hooks[name].module_path).weight if name in here.hooks else 1.0


def centred(here, vector):
    return vector - vector.mean() if hasattr(here.final_norm, "bias") else vector
