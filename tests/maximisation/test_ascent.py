"""Input maximisation where the optimum is known, and its results recomputed by plain forwards."""

import numpy as np
import pytest
import torch

from mi_pipe.core.errors import ConfigError, HookPointError
from mi_pipe.core.store import Store
from mi_pipe.maximisation.ascent import maximise_input
from mi_pipe.maximisation.running import token_embeddings
from mi_pipe.maximisation.targets import Feature, Neuron, Projection, head_output
from mi_pipe.models.handle import resolve_model
from mi_pipe.models.loading import load_model
from tests.maximisation.saes import random_sae
from tests.models.tiny import save_tiny_llama
from tests.stages.toys import toy_model

FIRST, LAST = "blocks.0.hook_resid_pre", "blocks.1.hook_resid_post"
DIRECTION = torch.linspace(-1, 2, 32)


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return toy_model(Store(tmp_path_factory.mktemp("store"))).load("cpu")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = save_tiny_llama(tmp_path_factory.mktemp("llama"))
    return load_model(resolve_model(str(folder), Store(tmp_path_factory.mktemp("store")), device="cpu"))


def test_of_a_linear_map_the_optimum_is_found(toy):
    found = maximise_input(toy, Projection(FIRST, DIRECTION), n_pos=2, n_steps=150, n_restarts=3)
    norms = token_embeddings(toy).norm(dim=1)
    best = norms.median() * DIRECTION.norm()
    np.testing.assert_allclose(found.soft, best, rtol=1e-3)
    aligned = torch.cosine_similarity(found.embeddings[:, -1], DIRECTION, dim=-1)
    assert aligned.min() > 0.999
    nearest = (torch.nn.functional.normalize(token_embeddings(toy), dim=1) @ DIRECTION).argmax()
    assert (found.near_ids[:, -1, 0] == nearest.item()).all()


@pytest.mark.parametrize("at", ["last", "mean"])
@pytest.mark.parametrize("lr", [0.1, 60.0])
def test_it_never_ends_below_its_start(toy, at, lr):
    found = maximise_input(toy, Neuron(LAST, 3), n_pos=4, n_steps=12, n_restarts=3, lr=lr, at=at)
    assert (found.soft >= found.curve[:, 0]).all()
    assert found.curve.shape == (3, 13)
    norms = found.embeddings.norm(dim=-1)
    torch.testing.assert_close(norms, token_embeddings(toy).norm(dim=1).median().expand_as(norms))


def test_the_gradient_is_that_of_the_whole_model(llama):
    """The embeddings found are worth what transformers' own forward from embeddings says, and more than random ones."""
    found = maximise_input(llama, Neuron(LAST, 3), n_pos=3, n_steps=60, n_restarts=2, at="mean", prefix=" a b")
    fixed = torch.tensor([llama.vocabulary.bos_id, *llama.vocabulary.encode(" a b")])
    head = token_embeddings(llama)[fixed].expand(2, -1, -1)
    output = llama.module(inputs_embeds=torch.cat([head, found.embeddings], 1), output_hidden_states=True)
    mlp = llama.module.model.layers[1]
    hidden = mlp(
        output.hidden_states[1],
        position_embeddings=llama.module.model.rotary_emb(output.hidden_states[1], torch.arange(len(fixed) + 3)[None]),
    )
    hidden = hidden[0] if isinstance(hidden, tuple) else hidden
    np.testing.assert_allclose(found.soft, hidden[:, -3:, 3].mean(1).detach(), rtol=1e-4)
    assert (found.soft > found.curve[:, 0] + 0.04).all()
    assert found.prefix == "<s> a b"


def test_tokens_are_worth_what_a_plain_run_says(toy):
    target = head_output(toy, 1, 2, DIRECTION)
    found = maximise_input(toy, target, n_pos=5, n_steps=30, n_restarts=3, prefix=[4, 7], n_swaps=2)
    tokens = torch.cat([torch.tensor([[4, 7]] * 3), torch.from_numpy(found.token_ids)], 1)
    _, cache = toy.bridge.run_with_cache(tokens)
    z = cache["blocks.1.attn.hook_z"].reshape(3, 7, 4, 8)[:, -1, 2]
    expected = z @ target.W_O @ DIRECTION
    np.testing.assert_allclose(found.tokens, expected, rtol=1e-4)
    np.testing.assert_allclose(found.tokens_activation, expected, rtol=1e-4)
    table = found.table()
    assert table["tokens_activation"].is_monotonic_decreasing
    assert table["text"][0] == "".join(f" {token}" for token in found.token_ids[table["restart"][0]])


def test_swaps_find_the_best_token_where_all_can_be_run(toy):
    target = Neuron(LAST, 9)
    found = maximise_input(toy, target, n_pos=1, n_steps=1, n_restarts=2, prefix=[4, 7], n_swaps=1, n_candidates=64)
    tokens = torch.tensor([[4, 7, token] for token in range(64)])
    values = toy.bridge.run_with_cache(tokens)[1][LAST][:, -1, 9]
    assert (found.token_ids[:, 0] == values.argmax().item()).all()


def test_swaps_never_make_it_worse(llama):
    options = {"n_pos": 4, "n_steps": 10, "n_restarts": 3}
    without = maximise_input(llama, Neuron(LAST, 3), **options, n_swaps=0)
    swapped = maximise_input(llama, Neuron(LAST, 3), **options, n_swaps=3, n_candidates=16)
    assert (swapped.tokens >= without.tokens).all()
    assert (swapped.tokens > without.tokens).any()
    assert not set(swapped.token_ids.ravel()) & llama.vocabulary.special_ids


def test_exchanges_alone_begin_at_given_tokens_and_reach_the_best_pair(toy):
    """Before the first block positions are independent: the best pair is the best token twice."""
    target = Projection(FIRST, DIRECTION)
    found = maximise_input(toy, target, start=[[5, 9], [60, 2]], n_steps=0, n_swaps=40, n_top=63, at="mean")
    assert found.curve.shape == (2, 1)
    with torch.no_grad():
        best = toy.bridge.run_with_cache(torch.tensor([[0, token] for token in range(64)]))[1][FIRST] @ DIRECTION
    np.testing.assert_allclose(found.tokens, float(best[:, 1].max()), rtol=1e-4)
    kept = maximise_input(toy, Neuron(LAST, 9), start=[[5, 9], [60, 2]], n_steps=0, n_swaps=0)
    assert kept.token_ids.tolist() == [[5, 9], [60, 2]]
    assert maximise_input(toy, Neuron(LAST, 9), start=[[5, 9]], n_steps=0, n_swaps=5).tokens[0] > kept.tokens[0]


def test_features_are_climbed_by_their_pre_activation(toy):
    sae = random_sae(LAST)
    found = maximise_input(toy, Feature(sae, 7), n_pos=3, n_steps=40, n_restarts=2)
    tokens = torch.from_numpy(found.token_ids)
    x = toy.bridge.run_with_cache(tokens)[1][LAST][:, -1]
    np.testing.assert_allclose(found.tokens, sae.pre_activations(x)[:, 7], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found.tokens_activation, sae.encode(x)[:, 7], rtol=1e-4, atol=1e-4)
    assert (found.soft > found.curve[:, 0]).all()


def test_near_tokens_are_listed_by_cosine(toy):
    found = maximise_input(toy, Neuron(LAST, 3), n_pos=2, n_steps=5, n_restarts=1, n_near=3)
    lines = found.nearest()
    cosines = torch.cosine_similarity(found.embeddings[0, 1], token_embeddings(toy), dim=-1)
    top = cosines.topk(3)
    of_second = lines[lines["pos"] == 1]
    assert of_second["token_id"].tolist() == top.indices.tolist()
    np.testing.assert_allclose(of_second["cosine"], top.values, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": [[1, 2], [3]]}, "start has rows of 1, 2 tokens; one length is needed"),
        ({"start": []}, "start has rows of no tokens"),
        ({"start": [[1, 64]]}, "start has tokens 1 to 64; the model's are 0 to 63"),
        ({"n_step": 3}, "no option 'n_step'. Did you mean 'n_steps'"),
        ({"lr": -1.0}, "maximise_input: lr is -1.0; input should be greater than 0"),
    ],
)
def test_mistaken_options_are_told_in_a_sentence(toy, options, message):
    with pytest.raises(ConfigError, match=message):
        maximise_input(toy, Neuron(LAST, 0), **options)


def test_what_the_model_has_not_is_refused(toy, llama):
    with pytest.raises(ConfigError, match="there is no 99"):
        maximise_input(toy, Neuron(LAST, 99))
    with pytest.raises(HookPointError, match="layers 0 to 1"):
        maximise_input(toy, Neuron("blocks.7.hook_resid_post", 0))
    with pytest.raises(ConfigError, match="The prefix has 2 tokens and 63 are free; the model takes 64"):
        maximise_input(llama, Neuron(LAST, 0), n_pos=63, prefix=" a")
    with pytest.raises(HookPointError, match="cannot be read on the plain model"):
        maximise_input(llama, Neuron("blocks.0.attn.hook_rot_q", 0))
