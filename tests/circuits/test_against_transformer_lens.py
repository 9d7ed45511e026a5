"""The same scores and faithfulness as TransformerLens, where it has them (no grouped queries, no native models)."""

import numpy as np
import pytest
import torch
from transformer_lens.tools.analysis.attribution_patching import (
    EdgeAttributionConfig,
    attribution_patch,
    faithfulness,
)

from mi_pipe.circuits.eap import score_edges
from mi_pipe.circuits.faithfulness import CircuitRunner, base_metrics, normalised_faithfulness
from mi_pipe.circuits.parts import find_parts
from tests.circuits import tiny

NAMES = ["gpt2", "neox", "llama"]
KINDS = {"q_input": "q", "k_input": "k", "v_input": "v"}


def writer_name(node):
    return {"embed": "embed", "mlp_out": f"m{node.layer}"}.get(node.kind, f"a{node.layer}.h{node.head}")


def reader_name(node):
    if node.kind in KINDS:
        return f"a{node.layer}.h{node.head}.{KINDS[node.kind]}"
    return "logits" if node.kind == "logits" else f"m{node.layer}"


def metric_of(answer, wrong):
    return lambda logits: logits[0, -1, answer] - logits[0, -1, wrong]


@pytest.fixture(params=NAMES)
def model(request):
    """A model whose embedding takes gradients, as TransformerLens needs it."""
    found = tiny.model(request.param)
    found.module.requires_grad_(True)
    yield found
    found.module.requires_grad_(False)


def test_edge_scores_summed_over_positions_are_those_of_attribution_patch(model):
    parts, pairs = find_parts(model), tiny.pairs(n_pairs=2)
    scores = score_edges(parts, pairs)
    totals = torch.zeros_like(scores)
    for i in range(len(pairs)):
        # Its base run is the one called corrupt, and its scores point to the one called clean: noising swaps them.
        result = attribution_patch(
            model.bridge,
            clean=pairs.corrupted[i : i + 1],
            corrupt=pairs.clean[i : i + 1],
            metric_fn=metric_of(pairs.answer[i], pairs.wrong[i]),
            config=EdgeAttributionConfig(granularity="edge"),
        )
        for (writer, reader), score in result.edge_scores.items():
            totals[i, parts.graph.names[writer_name(writer)], parts.graph.reader_names[reader_name(reader)]] += score
    largest = float(scores.abs().max())
    assert float((scores - totals).abs().max()) < 1e-6 * largest
    assert (totals != 0).any(0).sum() <= parts.graph.n_edges


def test_faithfulness_of_a_random_circuit_is_that_of_transformer_lens(model):
    parts, pairs = find_parts(model), tiny.pairs(n_pairs=1)
    mask = parts.graph.edge_mask & (np.random.default_rng(1).random(parts.graph.edge_mask.shape) < 0.6)
    metric_fn = metric_of(pairs.answer[0], pairs.wrong[0])
    whole = attribution_patch(
        model.bridge, pairs.clean, pairs.corrupted, metric_fn, EdgeAttributionConfig(granularity="edge")
    )
    kept = [
        edge
        for edge in whole.edge_scores
        if mask[parts.graph.names[writer_name(edge[0])], parts.graph.reader_names[reader_name(edge[1])]]
    ]
    expected = faithfulness(model.bridge, pairs.clean, pairs.corrupted, metric_fn, kept).recovered
    metric = CircuitRunner(parts, pairs).metric(mask).numpy()
    clean, corrupted = (values.numpy() for values in base_metrics(parts, pairs))
    assert normalised_faithfulness(metric, clean, corrupted) == pytest.approx(expected, abs=1e-6)
