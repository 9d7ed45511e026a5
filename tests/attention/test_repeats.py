import numpy as np
import pytest
import torch

from mi_pipe.attention.diagonals import SCORES
from mi_pipe.attention.repeats import fitting_period, half_losses, measure_repeats, repeated_sequences
from mi_pipe.attention.watching import check_patterns
from mi_pipe.core.errors import HookPointError
from mi_pipe.models.hook_points import HookMap
from mi_pipe.models.vocabulary import NumberVocabulary
from tests.patching.conftest import D_VOCAB, make_model

PERIOD = 5


@pytest.mark.parametrize("name", ["gpt2", "neox", "llama_gqa", "native_attn_only"])
def test_scores_equal_a_direct_loop_over_the_bridges_patterns(name):
    model = make_model(name)
    tokens = repeated_sequences(model.vocabulary, model.info, 3, PERIOD, seed=1)
    found = measure_repeats(model, tokens, PERIOD).scores.mean(axis=0)
    _, cache = model.bridge.run_with_cache(tokens, names_filter=lambda hook: hook.endswith("attn.hook_pattern"))
    lags = {"previous_token": 1, "duplicate_token": PERIOD, "induction": PERIOD - 1}
    largest = 0.0
    for layer in range(model.info.n_layers):
        pattern = cache[f"blocks.{layer}.attn.hook_pattern"].numpy()
        for head in range(model.info.n_heads):
            for score, lag in lags.items():
                cells = [pattern[b, head, q, q - lag] for b in range(3) for q in range(lag, 2 * PERIOD)]
                wanted = sum(map(float, cells)) / len(cells)
                largest = max(largest, abs(found[layer, head, SCORES.index(score)] - wanted))
            share = [float(pattern[b, head, q, 0]) for b in range(3) for q in range(1, 2 * PERIOD)]
            assert found[layer, head, SCORES.index("first_token_share")] == pytest.approx(np.mean(share), abs=1e-9)
    assert largest < 1e-9


def test_scores_do_not_depend_on_how_sequences_are_batched():
    model = make_model("llama_gqa")
    tokens = repeated_sequences(model.vocabulary, model.info, 4, PERIOD, seed=1)
    whole = measure_repeats(model, tokens, PERIOD)
    halves = [measure_repeats(model, part, PERIOD) for part in tokens.split(2)]
    np.testing.assert_allclose(whole.scores, np.concatenate([half.scores for half in halves]), atol=1e-6)
    np.testing.assert_allclose(whole.losses, np.concatenate([half.losses for half in halves]), atol=1e-5)


def test_sequences_are_random_ordinary_tokens_written_twice_without_bos():
    model = make_model("gpt2")
    tokens = repeated_sequences(model.vocabulary, model.info, 6, PERIOD, seed=3)
    assert tokens.shape == (6, 2 * PERIOD)
    assert bool((tokens[:, :PERIOD] == tokens[:, PERIOD:]).all())
    assert not set(tokens.unique().tolist()) & set(model.vocabulary.special_ids)
    assert int(tokens.max()) < D_VOCAB
    assert not bool((tokens[0] == tokens[1]).all())
    again = repeated_sequences(model.vocabulary, model.info, 6, PERIOD, seed=3)
    assert bool((again == tokens).all())


def test_the_period_shrinks_to_the_context_and_the_vocabulary():
    info = make_model("native_attn_only").info
    assert fitting_period(50, NumberVocabulary(D_VOCAB), info) == info.n_ctx // 2
    assert fitting_period(50, NumberVocabulary(10), info) == 10
    assert fitting_period(7, NumberVocabulary(D_VOCAB), info) == 7


def test_half_losses_of_a_worked_example():
    # Period 2: token 1 belongs to the first half, token 3 to the second; token 2 begins the copy and counts nowhere.
    logits = torch.log(torch.tensor([[[0.5, 0.5], [0.1, 0.9], [0.75, 0.25], [0.5, 0.5]]]))
    losses = half_losses(logits, torch.tensor([[0, 1, 0, 1]]), period=2)
    torch.testing.assert_close(losses, -torch.log(torch.tensor([[0.5, 0.25]], dtype=torch.float64)), atol=1e-6, rtol=0)


def test_a_model_without_patterns_is_refused():
    with pytest.raises(HookPointError, match="hook_pattern"):
        check_patterns(HookMap([]), 1)
