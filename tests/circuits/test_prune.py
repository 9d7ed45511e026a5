import numpy as np

from mi_pipe.circuits.graph import Graph
from mi_pipe.circuits.prune import prune, ranking, select_edges


def mask_of(graph, *edges):
    mask = np.zeros_like(graph.edge_mask)
    for source, target in edges:
        assert graph.edge_mask[graph.names[source], graph.reader_names[target]], (source, target)
        mask[graph.names[source], graph.reader_names[target]] = True
    return mask


def scores_of(graph, **edges):
    scores = np.zeros(graph.edge_mask.shape)
    for edge, score in edges.items():
        source, target = edge.split("__")
        scores[graph.names[source.replace("_", ".")], graph.reader_names[target.replace("_", ".")]] = score
    return scores


def test_a_node_without_inputs_goes_and_takes_those_that_lived_on_it():
    graph = Graph(3, 2, 2)
    mask = mask_of(
        graph, ("embed", "a0.h0.v"), ("a0.h0", "logits"), ("a0.h1", "a1.h0.k"), ("a1.h0", "m2"), ("m2", "logits")
    )
    assert np.array_equal(prune(graph, mask), mask_of(graph, ("embed", "a0.h0.v"), ("a0.h0", "logits")))


def test_a_node_without_use_goes_and_takes_those_that_fed_it():
    graph = Graph(3, 2, 2)
    mask = mask_of(graph, ("embed", "logits"), ("embed", "a0.h0.q"), ("a0.h0", "m1"), ("m1", "a2.h1.v"))
    assert np.array_equal(prune(graph, mask), mask_of(graph, ("embed", "logits")))


def test_a_shared_key_keeps_every_head_of_its_group():
    graph = Graph(2, 4, 2)
    mask = mask_of(graph, ("embed", "a0.kv1.k"), ("a0.h2", "logits"), ("a0.h3", "m1"), ("m1", "logits"))
    assert np.array_equal(prune(graph, mask), mask)
    other_group = mask_of(graph, ("embed", "a0.kv0.k"), ("a0.h2", "logits"))
    assert not prune(graph, other_group).any()


def test_the_best_edges_are_the_largest_or_the_most_negative():
    graph = Graph(1, 1, 1)
    scores = scores_of(graph, embed__a0_h0_q=3.0, embed__m0=-2.0, a0_h0__logits=1.0, m0__logits=-0.5)
    assert named(graph, select_edges(graph, scores, 2, "absolute", "top")) == {("embed", "a0.h0.q"), ("embed", "m0")}
    assert named(graph, select_edges(graph, scores, 2, "signed", "top")) == {("embed", "m0"), ("m0", "logits")}


def test_greedy_selection_grows_from_the_logits():
    graph = Graph(2, 1, 1)
    scores = scores_of(graph, embed__a0_h0_q=9.0, a0_h0__m1=5.0, m1__logits=1.0, embed__logits=2.0, m0__logits=0.5)
    edges = [named(graph, select_edges(graph, scores, n, "absolute", "greedy")) for n in (1, 2, 3, 4)]
    assert edges[0] == {("embed", "logits")}
    assert edges[1] - edges[0] == {("m1", "logits")}
    assert edges[2] - edges[1] == {("a0.h0", "m1")}
    assert edges[3] - edges[2] == {("embed", "a0.h0.q")}


def test_greedy_selection_of_all_edges_is_the_graph():
    graph = Graph(3, 4, 2)
    scores = np.random.default_rng(0).normal(size=graph.edge_mask.shape)
    for selection in ("greedy", "top"):
        assert np.array_equal(select_edges(graph, scores, graph.n_edges, "absolute", selection), graph.edge_mask)
        assert np.array_equal(prune(graph, graph.edge_mask), graph.edge_mask)


def test_ties_go_by_the_order_of_edges():
    graph = Graph(2, 2, 2)
    assert np.array_equal(ranking(graph, np.ones(graph.edge_mask.shape), "absolute"), np.arange(graph.n_edges))


def named(graph, mask):
    return {(graph.writers[w].name, graph.readers[r].name) for w, r in zip(*np.nonzero(mask), strict=True)}
