"""Circuits of the real model, whose queries are grouped: equal to the definition, and true of exact patching."""

import pytest
import torch

from mi_pipe.circuits.eap import score_edges
from mi_pipe.circuits.faithfulness import CircuitRunner, base_metrics
from mi_pipe.circuits.parts import find_parts
from mi_pipe.circuits.recording import Pairs
from mi_pipe.models.loading import load_model
from tests.circuits.reference import Reference, brute_force_circuit, brute_force_eap

pytestmark = pytest.mark.real_model
CLEAN = [
    "Then, Mary and John went to the store. John gave a drink to",
    "Then, Tom and Anna went to the park. Tom gave a ring to",
]
CORRUPTED = [
    "Then, Paul and Kate went to the store. Tom gave a drink to",
    "Then, Mark and Jack went to the park. Emma gave a ring to",
]
ANSWERS = [(" Mary", " John"), (" Anna", " Tom")]


@pytest.fixture(scope="module")
def parts(smollm2):
    return find_parts(load_model(smollm2))


@pytest.fixture(scope="module")
def pairs(parts):
    encode = parts.model.vocabulary.encode
    clean, corrupted = (torch.tensor([encode(text) for text in texts]) for texts in (CLEAN, CORRUPTED))
    answer, wrong = (torch.tensor([encode(answers[i])[0] for answers in ANSWERS]) for i in (0, 1))
    return Pairs(clean, corrupted, answer, wrong)


@pytest.fixture(scope="module")
def reference(parts):
    return Reference("llama_gqa", parts.model.module)


def test_all_scores_are_those_of_the_definition(parts, pairs, reference):
    graph = parts.graph
    scores = score_edges(parts, pairs).mean(0)
    expected = torch.zeros_like(scores)
    for (source, target), score in brute_force_eap(reference, pairs).items():
        expected[graph.names[source], graph.reader_names[target]] = score
    assert graph.n_edges == 70_651
    difference = float((scores - expected).abs().max())
    assert difference < 1e-4 * float(expected.abs().max())


def test_strong_edges_have_the_sign_and_size_that_exact_patching_gives(parts, pairs):
    graph, runner = parts.graph, CircuitRunner(parts, pairs)
    scores = score_edges(parts, pairs).mean(0)
    clean, _ = base_metrics(parts, pairs)
    assert (clean > 2).all()
    torch.testing.assert_close(runner.metric(graph.edge_mask), clean, rtol=0, atol=1e-4)
    into_logits = scores[:, -1].abs().topk(8).indices
    exact = torch.empty(len(into_logits))
    for i, writer in enumerate(into_logits):
        mask = graph.edge_mask.copy()
        mask[int(writer), -1] = False
        exact[i] = (runner.metric(mask) - clean).mean()
    estimate = scores[into_logits, -1]
    assert (exact.sign() == estimate.sign()).all()
    assert torch.corrcoef(torch.stack([exact, estimate]))[0, 1] > 0.95


def test_a_circuit_computes_what_the_slow_implementation_computes(parts, pairs, reference):
    graph = parts.graph
    scores = score_edges(parts, pairs).mean(0).numpy()
    mask = graph.edge_mask & (abs(scores) > 0.01)
    edges = {(graph.writers[w].name, graph.readers[r].name) for w, r in zip(*mask.nonzero(), strict=True)}
    expected = brute_force_circuit(reference, pairs, edges)
    torch.testing.assert_close(CircuitRunner(parts, pairs).metric(mask), expected, rtol=1e-3, atol=1e-3)
