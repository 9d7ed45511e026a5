import copy

import numpy as np
import pytest
import torch

from mi_pipe.circuits.eap import score_edges
from mi_pipe.circuits.faithfulness import CircuitRunner, base_metrics, bootstrap_interval, normalised_faithfulness
from mi_pipe.circuits.parts import find_parts
from mi_pipe.circuits.prune import prune
from tests.circuits import tiny
from tests.circuits.reference import Reference, brute_force_circuit


def named(graph, mask):
    return {(graph.writers[w].name, graph.readers[r].name) for w, r in zip(*np.nonzero(mask), strict=True)}


def random_mask(graph, share, seed):
    rng = np.random.default_rng(seed)
    return graph.edge_mask & (rng.random(graph.edge_mask.shape) < share)


@pytest.mark.parametrize("name", tiny.SUPPORTED)
def test_full_circuit_is_the_clean_run_and_empty_circuit_the_corrupted_run(name):
    model, pairs = tiny.model(name), tiny.pairs()
    parts = find_parts(model)
    runner = CircuitRunner(parts, pairs)
    rows = torch.arange(len(pairs))

    def metric(tokens):
        logits = model.logits(tokens)[:, -1]
        return (logits[rows, pairs.answer] - logits[rows, pairs.wrong]).detach()

    clean, corrupted = metric(pairs.clean), metric(pairs.corrupted)
    assert (clean - corrupted).abs().min() > 1e-3
    torch.testing.assert_close(base_metrics(parts, pairs), (clean, corrupted), rtol=0, atol=1e-5)
    torch.testing.assert_close(runner.metric(parts.graph.edge_mask), clean, rtol=0, atol=1e-5)
    torch.testing.assert_close(runner.metric(np.zeros_like(parts.graph.edge_mask)), corrupted, rtol=0, atol=1e-5)
    one_edge = np.zeros_like(parts.graph.edge_mask)
    one_edge[parts.graph.first_head(1), -1] = True  # a writer without inputs writes what it wrote
    torch.testing.assert_close(runner.metric(one_edge), corrupted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", tiny.REFERENCED)
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_circuit_computes_what_the_slow_implementation_computes(name, share):
    model, pairs = tiny.model(name), tiny.pairs()
    parts = find_parts(model)
    runner, reference = CircuitRunner(parts, pairs), Reference(name, model.module)
    for seed in range(3):
        mask = random_mask(parts.graph, share, seed)
        expected = brute_force_circuit(reference, pairs, named(parts.graph, mask))
        torch.testing.assert_close(runner.metric(mask), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["llama_gqa", "neox", "native_attn_only"])
def test_pruning_changes_no_metric(name):
    parts, pairs = find_parts(tiny.model(name)), tiny.pairs()
    runner = CircuitRunner(parts, pairs)
    for seed in range(4):
        mask = random_mask(parts.graph, 0.15, seed)
        pruned = prune(parts.graph, mask)
        assert pruned.sum() < mask.sum()
        torch.testing.assert_close(runner.metric(pruned), runner.metric(mask), rtol=0, atol=1e-6)


def test_running_a_circuit_leaves_the_model_as_it_was():
    model, pairs = tiny.model("gpt2"), tiny.pairs()
    before = model.logits(pairs.clean)
    runner = CircuitRunner(find_parts(model), pairs)
    runner.metric(runner.parts.graph.edge_mask)
    assert torch.equal(model.logits(pairs.clean), before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.module.modules())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_the_identities_as_far_as_it_goes(dtype):
    model, pairs = copy.deepcopy(tiny.model("llama_gqa")), tiny.pairs()
    model.module.to(dtype)
    parts = find_parts(model)
    clean, corrupted = base_metrics(parts, pairs)
    gap = float((clean - corrupted).abs().max())
    runner = CircuitRunner(parts, pairs)
    torch.testing.assert_close(runner.metric(parts.graph.edge_mask), clean, rtol=0, atol=0.03 * gap)
    assert torch.equal(runner.metric(np.zeros_like(parts.graph.edge_mask)), corrupted)
    exact = score_edges(find_parts(tiny.model("llama_gqa")), pairs)
    assert float((score_edges(parts, pairs) - exact).abs().max()) < 0.1 * float(exact.abs().max())


def test_single_precision_keeps_the_identities():
    model, pairs = copy.deepcopy(tiny.model("llama_gqa")), tiny.pairs()
    model.module.float()
    parts = find_parts(model)
    runner = CircuitRunner(parts, pairs)
    clean, corrupted = (values.numpy() for values in base_metrics(parts, pairs))
    full = runner.metric(parts.graph.edge_mask).numpy()
    assert normalised_faithfulness(full, clean, corrupted) == pytest.approx(1, abs=1e-5)
    assert normalised_faithfulness(corrupted, clean, corrupted) == 0


def test_interval_covers_the_figure_and_narrows_with_pairs():
    rng = np.random.default_rng(0)

    def width(n_pairs):
        clean, corrupted = rng.normal(3, 0.5, n_pairs), rng.normal(-1, 0.5, n_pairs)
        metric = corrupted + 0.8 * (clean - corrupted) + rng.normal(0, 0.5, n_pairs)
        low, high = bootstrap_interval(metric, clean, corrupted, 500, seed=0)
        assert low < normalised_faithfulness(metric, clean, corrupted) < high
        return high - low

    assert width(400) < width(16) / 2


def test_interval_is_the_same_for_the_same_seed():
    metric, clean, corrupted = np.array([1.0, 2.0, 3.0]), np.array([3.0, 4.0, 4.0]), np.zeros(3)
    assert bootstrap_interval(metric, clean, corrupted, 100, 7) == bootstrap_interval(metric, clean, corrupted, 100, 7)
