import pytest
import torch

from mi_pipe.heads.name_copying import Names, name_copying, read_names
from tests.circuits.tiny import model, pairs

PLACES = torch.tensor([[0, 2, 3], [1, 2, 4], [0, 3, 5]])


def brute_force(name, here, layer, states, tokens, sign):
    """One name, one head at a time, with the block's own modules."""
    attention_norm = here.submodule(here.hooks[f"blocks.{layer}.ln1.hook_in"].module_path)
    n_heads, d_head = here.info.n_heads, here.info.d_head
    weights = here.bridge.blocks[layer].attn
    w_v, w_o = weights.W_V.reshape(-1, here.info.d_model, d_head), weights.W_O.reshape(n_heads, d_head, -1)
    b_v = getattr(weights, "b_V", None)
    found = []
    for head in range(n_heads):
        group = head // (n_heads // len(w_v))
        right = 0
        for state, token in zip(states, tokens.tolist(), strict=True):
            value = attention_norm(state) @ w_v[group]
            value = value + b_v.reshape(-1, d_head)[group] if b_v is not None else value
            written = value @ w_o[head]
            if name == "gemma2":
                written = here.module.model.layers[layer].post_attention_layernorm(written)
            written = sign * written
            right += token in here.unembedding(here.final_norm(written)).topk(5).indices.tolist()
        found.append(right / len(states))
    return found


@pytest.mark.parametrize("name", ["gpt2", "neox", "llama_gqa", "qwen3", "gemma2"])
def test_scores_are_those_of_the_definition(name):
    here, prompts = model(name), pairs().clean
    names = read_names(here, prompts, PLACES)
    assert names.tokens.tolist() == prompts.gather(1, PLACES).flatten().tolist()
    scores = [name_copying(here, layer, names) for layer in range(2)]
    for layer in range(2):
        for row, sign in enumerate((1, -1)):
            assert scores[layer][row].tolist() == pytest.approx(
                brute_force(name, here, layer, names.states, names.tokens, sign)
            )
    assert 0 < torch.stack(scores).mean() < 1, "some names are copied, and some are not"


def test_a_head_that_writes_the_names_own_direction_copies_it():
    here = model("native_no_norm")
    names = read_names(here, pairs().clean, PLACES)
    attention = here.submodule(here.hooks["blocks.1.attn.hook_out"].module_path)
    kept = {part: getattr(attention, part).weight.clone() for part in "vo"}
    d_head = here.info.d_head
    states = here.W_U.T[names.tokens]
    with torch.no_grad():
        basis = torch.linalg.svd(states, full_matrices=False).Vh[:d_head]
        attention.v.weight[:d_head], attention.o.weight[:, :d_head] = basis, basis.T
        found = name_copying(here, 1, Names(states, names.tokens))
        attention.o.weight[:, :d_head] *= -1
        turned = name_copying(here, 1, Names(states, names.tokens))
        for part, weight in kept.items():
            getattr(attention, part).weight.copy_(weight)
    assert found[0, 0] > 0.8
    assert found[1, 0] == 0
    assert turned[:, 0].tolist() == found[:, 0].flip(0).tolist()
