from dataclasses import replace

import numpy as np
import pytest
import torch

from mi_pipe.heads.composition import KINDS, composition, random_baseline
from mi_pipe.heads.eigenvalue_copying import full_ov_eigenvalue_copying, ov_eigenvalue_copying, token_map
from mi_pipe.heads.folding import folded_weights
from mi_pipe.models.head_weights import head_weights
from tests.circuits.tiny import model

NAMES = ["gpt2", "neox", "llama_gqa", "gemma2", "qwen3", "native_attn_only"]


def layers_of(name):
    here = model(name)
    return [head_weights(here, layer) for layer in range(here.info.n_layers)]


def whole(weights, kind):
    """The d_model x d_model matrix that `kind` reads with, head by head."""
    key, value = weights.to_heads(weights.W_K), weights.to_heads(weights.W_V)
    return {"q": weights.W_Q @ key.mT, "k": key @ weights.W_Q.mT, "v": value @ weights.W_O}[kind]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", KINDS)
def test_composition_is_that_of_transformer_lens(name, kind):
    found = composition(layers_of(name), kind).numpy()
    expected = model(name).bridge.all_composition_scores(kind.upper()).scores.detach().numpy()
    is_later = np.triu(np.ones((2, 2), bool), 1)[:, None, :, None]
    assert (np.isfinite(found) == np.broadcast_to(is_later, found.shape)).all(), "what is not later is NaN, not 0"
    np.testing.assert_allclose(np.nan_to_num(found), expected, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_composition_is_that_of_whole_matrices(kind):
    earlier, later = layers_of("llama_gqa")
    found = composition([earlier, later], kind)
    written = whole(earlier, "v")
    for i, a in enumerate(written):
        for j, b in enumerate(whole(later, kind)):
            expected = (a @ b).norm() / a.norm() / b.norm()
            assert found[0, i, 1, j].item() == pytest.approx(expected.item(), abs=1e-6)


def test_folded_weights_read_what_the_norm_lets_through():
    here = model("gpt2")
    folded, plain = folded_weights(here, 1), head_weights(here, 1)
    norm = here.submodule(here.hooks["blocks.1.ln1.hook_in"].module_path)
    x = torch.randn(3, here.info.d_model, dtype=torch.float64)
    scale = (x - x.mean(-1, keepdim=True)).square().mean(-1, keepdim=True).add(norm.eps).sqrt()
    expected = torch.einsum("nm,hmk->nhk", norm(x) - norm.bias, plain.W_Q)
    torch.testing.assert_close(torch.einsum("nm,hmk->nhk", x / scale, folded.W_Q), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(folded.W_O, plain.W_O)


def test_the_random_baseline_is_that_of_whole_random_matrices():
    mean, deviation = random_baseline(48, 6, 200, seed=0)
    draws = torch.randn(200, 4, 48, 6, generator=torch.Generator().manual_seed(1))
    a, b = draws[:, 0] @ draws[:, 1].mT, draws[:, 2] @ draws[:, 3].mT
    expected = (a @ b).norm(dim=(1, 2)) / a.norm(dim=(1, 2)) / b.norm(dim=(1, 2))
    assert mean == pytest.approx(expected.mean().item(), abs=4 * deviation / 200**0.5)
    assert deviation == pytest.approx(expected.std().item(), rel=0.3)


@pytest.mark.parametrize("name", NAMES)
def test_eigenvalue_copying_is_that_of_the_whole_matrices(name):
    here = model(name)
    embedding = here.submodule(here.hooks["embed.hook_out"].module_path).weight
    for weights in layers_of(name):
        ov = whole(weights, "v")
        circuits = {"ov": ov, "full": embedding @ ov @ here.W_U}
        found = {"ov": ov_eigenvalue_copying(weights), "full": full_ov_eigenvalue_copying(weights, token_map(here))}
        for part, matrices in circuits.items():
            eigenvalues = torch.linalg.eigvals(matrices)
            expected = eigenvalues.sum(-1).real / eigenvalues.abs().sum(-1)
            torch.testing.assert_close(found[part], expected, rtol=0, atol=1e-5)


def test_a_copying_head_scores_one():
    weights = layers_of("llama_gqa")[0]
    d_head = weights.W_O.shape[1]
    basis = torch.linalg.qr(torch.randn(weights.W_O.shape[2], d_head, dtype=torch.float64)).Q
    copier = replace(weights, W_V=basis[None].repeat(2, 1, 1), W_O=basis.mT[None].repeat(4, 1, 1))
    torch.testing.assert_close(ov_eigenvalue_copying(copier), torch.ones(4, dtype=torch.float64))
    anti = replace(copier, W_O=-copier.W_O)
    torch.testing.assert_close(ov_eigenvalue_copying(anti), -torch.ones(4, dtype=torch.float64))
