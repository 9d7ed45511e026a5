"""The induction circuit is found: previous-token head, keys of the induction head, logits."""

import numpy as np
import pytest
import torch

import mi_pipe
from mi_pipe.circuits.eap import EAP_ALPHAS, EdgeScores, ig_alphas, score_edges
from mi_pipe.circuits.faithfulness import CircuitRunner, base_metrics, normalised_faithfulness
from mi_pipe.circuits.parts import find_parts
from mi_pipe.circuits.prune import prune, ranking, select_edges
from mi_pipe.circuits.recording import Pairs
from mi_pipe.models.trained import native_module, wrap_native

D_VOCAB, N_CTX, SHARPNESS = 12, 16, 6.0
PATH = {("embed", "a0.h0.v"), ("a0.h0", "a1.h1.k"), ("a1.h1", "logits")}


def hand_built():
    """Two layers without normalisation: a0.h0 looks one token back, a1.h1 for the token that followed its own.

    The residual stream has four parts: the token, the token before, the position, the prediction.
    """
    fields = {"n_layers": 2, "n_heads": 2, "d_head": N_CTX, "d_model": 3 * D_VOCAB + N_CTX, "d_vocab": D_VOCAB}
    fields |= {"n_ctx": N_CTX, "attn_only": True, "normalization_type": None, "seed": 0, "act_fn": "relu"}
    module = native_module(fields | {"positional_embedding_type": "standard"})
    token, before = torch.arange(D_VOCAB), D_VOCAB + torch.arange(D_VOCAB)
    place, prediction = 2 * D_VOCAB + torch.arange(N_CTX), 2 * D_VOCAB + N_CTX + torch.arange(D_VOCAB)
    slots = torch.arange(N_CTX)
    with torch.no_grad():
        for weight in module.parameters():
            weight.zero_()
        module.tok_embed.weight[token, token] = 1
        module.pos.weight[slots, place] = 1
        back, match = module.layers[0].attn, module.layers[1].attn
        back.q.weight[slots[:-1], place[1:]] = 4 * SHARPNESS
        back.k.weight[slots, place] = 1
        back.v.weight[token, token] = 1
        back.o.weight[before, token] = 1
        head = N_CTX  # the second head's rows
        match.q.weight[head + token, token] = 4 * SHARPNESS
        match.k.weight[head + token, before] = 1
        match.v.weight[head + token, token] = 1
        match.o.weight[prediction, head + token] = 1
        module.head.weight[token, prediction] = SHARPNESS
    return wrap_native(module)


def key_pairs(n_pairs, period, d_vocab, seed=0):
    """Repeated blocks whose corrupted first copy has another token before the answer, so that nothing matches."""
    rng = np.random.default_rng(seed)
    blocks = np.stack([rng.permutation(d_vocab)[: period + 1] for _ in range(n_pairs)])
    clean = np.concatenate([blocks[:, :period], blocks[:, : period - 1]], axis=1)
    corrupted = clean.copy()
    corrupted[:, period - 2] = blocks[:, period]
    tokens = [torch.from_numpy(rows) for rows in (clean, corrupted)]
    return Pairs(*tokens, answer=tokens[0][:, period - 1], wrong=tokens[0][:, 1])


def named(graph, mask):
    return {(graph.writers[w].name, graph.readers[r].name) for w, r in zip(*np.nonzero(mask), strict=True)}


def test_the_circuit_of_a_hand_built_induction_model_is_found_exactly():
    model, pairs = hand_built(), key_pairs(8, 7, D_VOCAB)
    parts = find_parts(model)
    assert (model.logits(pairs.clean)[:, -1].argmax(-1) == pairs.answer).all()
    scores = EdgeScores.of(score_edges(parts, pairs, ig_alphas(20, "midpoint"))).mean
    best = select_edges(parts.graph, scores, 3, "signed", "top")
    assert named(parts.graph, best) == PATH
    assert np.array_equal(prune(parts.graph, best), best)
    clean, corrupted = (values.numpy() for values in base_metrics(parts, pairs))
    metric = CircuitRunner(parts, pairs).metric(best).numpy()
    assert normalised_faithfulness(metric, clean, corrupted) == pytest.approx(1, abs=0.02)
    for edge in PATH:
        broken = best.copy()
        broken[parts.graph.names[edge[0]], parts.graph.reader_names[edge[1]]] = False
        metric = CircuitRunner(parts, pairs).metric(broken).numpy()
        assert normalised_faithfulness(metric, clean, corrupted) == pytest.approx(0, abs=0.02)


def test_idle_heads_have_no_score():
    parts = find_parts(hand_built())
    scores = score_edges(parts, key_pairs(2, 7, D_VOCAB))
    for idle in ("a0.h1", "a1.h0"):
        assert not scores[:, parts.graph.names[idle]].any()
        for kind in "qkv":
            assert not scores[:, :, parts.graph.reader_names[f"{idle}.{kind}"]].any()


@pytest.mark.slow
@pytest.mark.parametrize("alphas", [EAP_ALPHAS, ig_alphas(5, "left")])
def test_the_previous_token_head_of_a_trained_toy_feeds_the_keys_of_its_induction_heads(trained_toy, alphas):
    parts, pairs = find_parts(trained_toy), key_pairs(32, 20, 64)
    graph = parts.graph
    previous, induction = _heads(trained_toy, pairs)
    scores = EdgeScores.of(score_edges(parts, pairs, alphas)).mean
    best = ranking(graph, scores, "absolute")[: graph.n_edges // 10]
    strong = np.zeros_like(graph.edge_mask)
    strong[tuple(index[best] for index in graph.edge_indices)] = True
    edges = named(graph, strong)
    assert (previous, f"{induction}.k") in edges
    assert (induction, "logits") in edges
    assert scores[graph.names[previous], graph.reader_names[f"{induction}.k"]] < 0
    circuit = prune(graph, select_edges(graph, scores, graph.n_edges // 5, "absolute", "top"))
    assert (previous, f"{induction}.k") in named(graph, circuit)
    clean, corrupted = (values.numpy() for values in base_metrics(parts, pairs))
    metric = CircuitRunner(parts, pairs).metric(circuit).numpy()
    assert normalised_faithfulness(metric, clean, corrupted) > 0.5


def _heads(model, pairs):
    """Return the names of the head that attends most to the token before, and of that most to the answer."""
    _, cache = model.bridge.run_with_cache(pairs.clean)
    patterns = [cache[f"blocks.{layer}.attn.hook_pattern"].detach() for layer in range(2)]
    previous = torch.stack([p.diagonal(offset=-1, dim1=-2, dim2=-1).mean((0, 2)) for p in patterns])
    n_pos = pairs.clean.shape[1]
    answer = torch.stack([p[:, :, n_pos - 1, n_pos // 2].mean(0) for p in patterns])
    names = [divmod(int(score.argmax()), score.shape[1]) for score in (previous, answer)]
    return tuple(f"a{layer}.h{head}" for layer, head in names)


@pytest.fixture(scope="module")
def trained_toy(tmp_path_factory):
    from mi_pipe.core.stage import execute
    from mi_pipe.core.store import Store
    from stages.train_model import STAGE, Inputs, TrainModelConfig

    store = Store(tmp_path_factory.mktemp("store"))
    return mi_pipe.open(execute(STAGE, TrainModelConfig(), Inputs(), store).artifact.path).load("cpu")
