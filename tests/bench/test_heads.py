import numpy as np
import pytest
import torch

from bench.heads.agreement import Comparison, Measure, spearman, top
from bench.heads.knock_outs import Exchange
from bench.heads.runs import matched
from mi_pipe.attention.repeats import repeated_sequences
from mi_pipe.prompts.prompt_set import PairGroup
from tests.circuits.tiny import model, pairs

PAIRS = pairs()


def measure(name, values):
    return Measure(name, np.array(values, float))


def test_ranks_and_tops_leave_out_what_was_not_measured():
    described = measure("described", [[0.9, 0.1, 0.8], [0.7, 0.6, 0.5]])
    caused = measure("caused", [[np.nan, 0.0, 3.0], [2.0, 1.0, 0.5]])
    found = Comparison("Movers", described, caused)
    assert found.n_heads() == 5
    assert found.rank_correlation() == pytest.approx(1.0)
    assert found.shared_top() == 5, "the first head was not measured by both"
    assert top(described.values, 2) == [0, 2]
    assert "| 0.2 | 0.80 | 3.00 |" in found.markdown()
    assert "0.0 |" not in found.markdown().replace("0.00 |", "")


def test_spearman_shares_ranks_of_ties():
    assert spearman(np.array([1.0, 1, 2, 3]), np.array([1.0, 2, 3, 4])) == pytest.approx(0.948683)


def test_heads_exchanged_together_equal_the_bridges_hooks():
    here = model("llama_gqa")
    group = PairGroup(np.arange(3), PAIRS.clean, PAIRS.corrupted, PAIRS.answer, PAIRS.wrong, [])
    exchange = Exchange(here, group)
    _, corrupted = here.bridge.run_with_cache(PAIRS.corrupted)
    names = [f"blocks.{layer}.attn.hook_z" for layer in range(2)]

    def swap(value, hook):
        changed = value.clone()
        by_head = changed.view(3, 6, here.info.n_heads, -1)
        by_head[:, -1, 1] = corrupted[hook.name].view(3, 6, here.info.n_heads, -1)[:, -1, 1]
        return changed

    patched = here.bridge.run_with_hooks(PAIRS.clean, fwd_hooks=[(name, swap) for name in names])[:, -1]
    clean, rows = here.bridge(PAIRS.clean)[:, -1], torch.arange(3)
    lost = clean - patched
    expected = (lost[rows, PAIRS.answer] - lost[rows, PAIRS.wrong]).detach().numpy()
    np.testing.assert_allclose(exchange.fall([(0, 1), (1, 1)], "end"), expected, atol=1e-5)
    assert np.abs(expected).max() > 1e-3
    held = exchange.fall([(0, 1)], "end", held=[(1, head) for head in range(4)])
    assert np.abs(held - exchange.fall([(0, 1)], "end")).max() > 1e-6, "the second layer may not answer"
    np.testing.assert_allclose(exchange.fall([], "end", held=[(0, 2), (1, 3)]), 0, atol=1e-7)


def test_a_receivers_diagonal_falls_by_what_an_earlier_heads_mean_does_to_it():
    here, period = model("gpt2"), 5
    found = matched(here, [(0, 0), (0, 1)], [(1, 0), (1, 2)], seed=0, period=period)
    tokens = repeated_sequences(here.vocabulary, here.info, 2, period, 0)
    kept = {}

    def average(value, hook):
        changed = value.clone()
        changed.view(2, 10, 4, -1)[:, :, 1] = value.view(2, 10, 4, -1)[:, :, 1].mean((0, 1))
        return changed

    for name, hooks in (("whole", []), ("without", [("blocks.0.attn.hook_z", average)])):
        keep = ("blocks.1.attn.hook_pattern", lambda value, hook, name=name: kept.update({name: value}))
        here.bridge.run_with_hooks(tokens, fwd_hooks=[*hooks, keep])
    cells = [(b, head, query) for b in range(2) for head in (0, 2) for query in range(period - 1, 2 * period)]
    lost = [kept["whole"][b, h, q, q - 4] - kept["without"][b, h, q, q - 4] for b, h, q in cells]
    assert found[0, 1] == pytest.approx(float(np.mean([value.item() for value in lost])), abs=1e-6)
    assert abs(found[0, 1]) > 1e-5
