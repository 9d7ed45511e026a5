import numpy as np
import pytest
import torch

from mi_pipe.circuits.eap import EdgeScores, ig_alphas, score_edges
from mi_pipe.circuits.faithfulness import CircuitRunner, base_metrics
from mi_pipe.circuits.parts import find_parts
from mi_pipe.core.errors import StageError
from tests.circuits import tiny
from tests.circuits.reference import Reference, brute_force_eap, plain


@pytest.mark.parametrize("name", tiny.REFERENCED)
def test_reference_computes_the_model(name):
    model, pairs = tiny.model(name), tiny.pairs()
    with torch.no_grad():
        logits, _ = Reference(name, model.module).run(pairs.clean, plain)
        torch.testing.assert_close(logits, model.logits(pairs.clean)[:, -1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", tiny.REFERENCED)
def test_scores_are_those_of_the_definition(name):
    model, pairs = tiny.model(name), tiny.pairs()
    parts = find_parts(model)
    expected = brute_force_eap(Reference(name, model.module), pairs)
    scores = score_edges(parts, pairs).mean(0)
    graph = parts.graph
    assert len(expected) == graph.n_edges
    named = {
        (graph.writers[w].name, graph.readers[r].name): float(scores[w, r])
        for w, r in zip(*graph.edge_indices, strict=True)
    }
    largest = max(map(abs, expected.values()))
    assert largest > 1e-3
    assert max(abs(named[edge] - expected[edge]) for edge in expected) < 1e-6 * largest


@pytest.mark.parametrize("name", tiny.REFERENCED)
def test_there_are_no_scores_beside_the_edges(name):
    parts = find_parts(tiny.model(name))
    assert not score_edges(parts, tiny.pairs())[:, ~torch.from_numpy(parts.graph.edge_mask)].any()


@pytest.mark.parametrize("name", tiny.SUPPORTED)
def test_scores_are_the_exact_effect_of_an_edge_where_the_change_is_small(name):
    model, pairs = tiny.model(name), tiny.pairs(n_pairs=2)
    parts = find_parts(model)
    small = _nearly_equal_embeddings(model, pairs)
    with small:
        scores = score_edges(parts, pairs).numpy()
        runner = CircuitRunner(parts, pairs)
        full = parts.graph.edge_mask
        clean, _ = base_metrics(parts, pairs)
        largest = np.abs(scores).max()
        rng = np.random.default_rng(0)
        for i in rng.choice(parts.graph.n_edges, size=25, replace=False):
            writer, reader = parts.graph.edge_indices[0][i], parts.graph.edge_indices[1][i]
            mask = full.copy()
            mask[writer, reader] = False
            effect = (runner.metric(mask) - clean).numpy()
            assert np.abs(effect - scores[:, writer, reader]).max() < 1e-3 * largest


class _nearly_equal_embeddings:
    """Within, the corrupted prompts' embeddings are the clean ones moved by a ten-thousandth."""

    def __init__(self, model, pairs):
        self.model, self.pairs = model, pairs

    def __enter__(self):
        embed = self.model.module.get_parameter(self.model.hooks["embed.hook_out"].module_path + ".weight")
        self.embed, self.old = embed, embed.clone()
        with torch.no_grad():
            noise = 1e-4 * torch.randn(embed.shape, dtype=embed.dtype, generator=torch.Generator().manual_seed(0))
            embed.copy_(embed.mean(0) + noise)

    def __exit__(self, *_):
        with torch.no_grad():
            self.embed.copy_(self.old)


def test_scores_of_a_pair_do_not_depend_on_its_batch():
    parts = find_parts(tiny.model("llama_gqa"))
    pairs = tiny.pairs(n_pairs=5)
    together = EdgeScores.of(score_edges(parts, pairs))
    apart = EdgeScores.summed([EdgeScores.of(score_edges(parts, pairs.rows(*part))) for part in [(0, 2), (2, 5)]])
    np.testing.assert_allclose(apart.mean, together.mean, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(apart.standard_error, together.standard_error, rtol=1e-7, atol=1e-12)


def test_mean_and_standard_error_of_three_pairs():
    scores = EdgeScores.of(torch.tensor([1.0, 2.0, 6.0])[:, None, None])
    assert scores.mean.item() == 3.0
    assert scores.standard_error.item() == pytest.approx(np.std([1, 2, 6], ddof=1) / np.sqrt(3))
    assert np.isnan(EdgeScores.of(torch.ones(1, 1, 1)).standard_error.item())


def test_integrated_gradients_conventions_differ_and_end_at_plain_attribution():
    parts, pairs = find_parts(tiny.model("gpt2")), tiny.pairs()
    plain_scores = score_edges(parts, pairs)
    torch.testing.assert_close(score_edges(parts, pairs, ig_alphas(1, "right")), plain_scores)
    left, right, midpoint = (score_edges(parts, pairs, ig_alphas(4, kind)) for kind in ("left", "right", "midpoint"))
    assert (left - right).abs().max() > 1e-3 * right.abs().max()
    # The left and right sums share all but their ends.
    ends = score_edges(parts, pairs, (0.0,))
    torch.testing.assert_close(4 * (right - left), plain_scores - ends)
    assert not torch.allclose(midpoint, (left + right) / 2)


def test_scores_sum_to_the_exact_change_of_a_linear_path():
    """With integrated gradients the scores out of the embedding along all paths are the whole effect."""
    parts, pairs = find_parts(tiny.model("native_attn_only")), tiny.pairs()
    clean, corrupted = base_metrics(parts, pairs)
    effect = corrupted - clean
    scores = score_edges(parts, pairs, ig_alphas(400, "midpoint"))
    torch.testing.assert_close(scores[:, 0].sum(1), effect, rtol=1e-4, atol=1e-5)


def test_models_with_normalised_outputs_are_refused():
    with pytest.raises(StageError, match="residual stream"):
        score_edges(find_parts(tiny.model("gemma2")), tiny.pairs())
