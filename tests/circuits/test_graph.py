import numpy as np
import pytest

from mi_pipe.circuits.graph import Graph


@pytest.mark.parametrize(("layers", "heads", "n_writers", "n_edges"), [(12, 12, 157, 32491), (12, 8, 109, 15355)])
def test_sizes_are_the_published_ones(layers, heads, n_writers, n_edges):
    graph = Graph(layers, heads, heads)
    assert (graph.n_writers, graph.n_readers) == (n_writers, layers * (3 * heads + 1) + 1)
    assert graph.n_edges == n_edges == graph.edge_mask.sum() == len(graph.edge_indices[0])


@pytest.mark.parametrize(
    "graph", [Graph(3, 4, 4), Graph(3, 4, 2), Graph(3, 4, 4, is_parallel=True), Graph(3, 4, 4, False)]
)
def test_edges_go_only_to_later_readers(graph):
    def time(node, is_writer):
        if node.layer is None:
            return np.inf if node.kind == "logits" else -1
        attention = 2 * node.layer
        if node.kind != "mlp":
            return attention + (0.5 if is_writer else 0)
        return attention + (1 if not graph.is_parallel or is_writer else 0) + (0.5 if is_writer else 0)

    for i, writer in enumerate(graph.writers):
        for j, reader in enumerate(graph.readers):
            assert graph.edge_mask[i, j] == (time(writer, True) < time(reader, False)), (writer, reader)


def test_mlp_of_a_parallel_block_does_not_read_its_own_heads():
    graph = Graph(2, 3, 3, is_parallel=True)
    mlp = graph.reader_names["m1"]
    assert not graph.edge_mask[graph.names["a1.h0"], mlp]
    assert graph.edge_mask[graph.names["a0.h2"], mlp]
    assert graph.edge_mask[graph.names["m0"], mlp]


def test_indices_lead_to_the_named_nodes():
    for graph in (Graph(3, 4, 2), Graph(2, 2, 2, has_mlp=False)):
        for layer in range(graph.n_layers):
            assert graph.writers[graph.first_head(layer)].name == f"a{layer}.h0"
            assert graph.readers[graph.first_projection(layer)].name == f"a{layer}.h0.q"
            if graph.has_mlp:
                assert graph.writers[graph.mlp_writer(layer)].name == f"m{layer}"
                assert graph.readers[graph.mlp_reader(layer)].name == f"m{layer}"
        assert graph.readers[-1].name == "logits"
        assert len(graph.names) == graph.n_writers
        assert len(graph.reader_names) == graph.n_readers


def test_shared_keys_and_values_feed_every_head_of_their_group():
    graph = Graph(2, 6, 2)
    fed = [graph.writers[i].name for i in np.flatnonzero(graph.feeds[graph.reader_names["a1.kv1.k"]])]
    assert fed == ["a1.h3", "a1.h4", "a1.h5"]
    assert not graph.feeds[-1].any()
    assert graph.feeds[graph.reader_names["m0"]].sum() == 1


def test_edges_are_listed_by_reader_and_then_writer():
    graph = Graph(2, 2, 2)
    writer, reader = graph.edge_indices
    assert np.array_equal(np.lexsort((writer, reader)), np.arange(graph.n_edges))
    assert (graph.writers[writer[0]].name, graph.readers[reader[0]].name) == ("embed", "a0.h0.q")
