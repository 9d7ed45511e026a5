"""An SAE on raw activations gives what the trained tensors give on normalised ones."""

import pytest
import torch

from mi_pipe.saes.inference import InferenceRule
from mi_pipe.saes.normalisation import Normaliser, fold
from mi_pipe.saes.parameters import initial_parameters

D, D_OUT, D_SAE = 8, 6, 24


def rules() -> dict[str, InferenceRule]:
    generator = torch.Generator().manual_seed(5)
    vector = torch.rand(D_SAE, generator=generator)
    return {
        "topk": InferenceRule("topk", k=3),
        "one threshold": InferenceRule("threshold", threshold=torch.tensor(0.4)),
        "thresholds": InferenceRule("threshold", threshold=vector),
        "relu": InferenceRule("threshold", threshold=torch.tensor(0.0)),
        "gated": InferenceRule("gated", r_mag=vector - 0.5, b_mag=vector.flip(0) - 0.4),
    }


def normaliser(width: int, seed: int) -> tuple[Normaliser, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rows = 7 * torch.randn(200, width, generator=generator) + 5 * torch.randn(width, generator=generator)
    mean = rows.double().mean(0)
    return Normaliser.from_moments(mean, float((rows - mean).square().sum(1).mean())), rows


def randomised(params):
    generator = torch.Generator().manual_seed(9)
    for value in params.named().values():
        value += 0.2 * torch.randn(value.shape, generator=generator)
    return params


@pytest.mark.parametrize("is_unit", [True, False])
@pytest.mark.parametrize("rule", list(rules()))
@pytest.mark.parametrize("kind", ["sae", "crosscoder", "transcoder", "skip"])
def test_folded_equals_normalised(kind, rule, is_unit):
    (read, x), rule = normaliser(D, 1), rules()[rule]
    written = read
    if kind == "crosscoder":
        (other, y), x = normaliser(D_OUT, 2), x
        read = written = Normaliser.joined([read, other])
        x = torch.cat([x, y], dim=1)
        params = initial_parameters(D + D_OUT, D_SAE, 0)
    elif kind == "sae":
        params = initial_parameters(D, D_SAE, 0)
    else:
        written, _ = normaliser(D_OUT, 2)
        params = initial_parameters(D, D_SAE, 0, d_out=D_OUT, skip=kind == "skip")
    params = randomised(params)
    if is_unit:
        params.W_dec /= params.W_dec.norm(dim=1, keepdim=True)
    sae = fold(params, rule, read, written)
    normal = read(x)
    pre = params.centred(normal) @ params.W_enc.T + params.b_enc
    expected = rule.dense(pre, params.b_enc) @ params.W_dec + params.b_dec
    if params.W_skip is not None:
        expected = expected + normal @ params.W_skip.T
    expected = expected / written.scale + written.mean
    torch.testing.assert_close(sae(x), expected, rtol=1e-3, atol=1e-3)
    if rule.kind != "topk" and not (is_unit and kind != "crosscoder"):
        torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(D_SAE))


def test_normalised_activations_have_a_mean_square_norm_of_their_width():
    norm, rows = normaliser(D, 3)
    assert float(norm(rows).square().sum(1).mean()) == pytest.approx(D, rel=1e-4)
