import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mi_pipe.saes import entries, step
from mi_pipe.saes.architectures.batchtopk import BatchTopK
from mi_pipe.saes.architectures.coefficient import Sparsity
from mi_pipe.saes.architectures.gated import Gated
from mi_pipe.saes.architectures.jumprelu import JumpReLU
from mi_pipe.saes.architectures.matryoshka import Matryoshka, prefixes
from mi_pipe.saes.architectures.p_anneal import PAnneal
from mi_pipe.saes.architectures.standard import Standard
from mi_pipe.saes.architectures.topk import TopK
from mi_pipe.saes.parameters import Parameters
from mi_pipe.saes.step import Batch, StepContext
from tests.saes import dense_reference as dense

FRACTIONS = (0.1, 0.4, 1.0)
FIXED = Sparsity(coefficient=0.7)
AIMED = Sparsity(target_l0=3.0, coefficient=0.7)
ARCHITECTURES = {
    "topk": (lambda k: TopK(k), lambda it, k: dense.topk_loss(it, k)),
    "batchtopk": (lambda k: BatchTopK(k, 100), lambda it, k: dense.batchtopk_loss(it, k)),
    "matryoshka": (
        lambda k: Matryoshka(k, 100, FRACTIONS),
        lambda it, k: dense.matryoshka_loss(it, k, prefixes(it.pre.shape[1], FRACTIONS)),
    ),
    "standard": (lambda k: Standard(FIXED), lambda it, k: dense.standard_loss(it, 0.7)),
    "p_anneal at first": (lambda k: PAnneal(FIXED), lambda it, k: dense.p_anneal_loss(it, 0.7, 1.0)),
    "p_anneal at last": (lambda k: PAnneal(FIXED), lambda it, k: dense.p_anneal_loss(it, 0.7, 0.2)),
    "gated": (lambda k: Gated(FIXED), lambda it, k: dense.gated_loss(it, 0.7)),
    **{
        f"jumprelu {form}": (
            lambda k, form=form: JumpReLU(AIMED, form, bandwidth=0.8),
            lambda it, k, form=form: dense.jumprelu_loss(it, 0.7, form, 0.8, 3.0),
        )
        for form in ("step", "tanh", "target")
    },
}
KINDS = ["sae", "transcoder", "skip transcoder"]


def random_parameters(
    d_in: int, d_sae: int, generator: torch.Generator, kind: str = "sae", name: str = ""
) -> Parameters:
    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    d_out = d_in if kind == "sae" else d_in + 1
    params = Parameters(randn(d_sae, d_in), randn(d_sae, d_out), randn(d_sae) * 0.3, randn(d_out) * 0.3)
    params.subtract_b_dec = kind == "sae"
    if kind == "skip transcoder":
        params.W_skip = randn(d_out, d_in)
    if name.startswith("jumprelu"):
        params.threshold = randn(d_sae).abs()
    if name == "gated":
        params.r_mag, params.b_mag = randn(d_sae) * 0.3, randn(d_sae) * 0.3
    return params


def both(name: str, d_in, d_sae, n_rows, k, n_dead, seed, coefficient=0.5, kind="sae"):
    """The project's step, and the loss and leaves of the dense one."""
    generator = torch.Generator().manual_seed(seed)
    params = random_parameters(d_in, d_sae, generator, kind, name)
    x = torch.randn(n_rows, d_in, generator=generator, dtype=torch.float64)
    target = (
        x if kind == "sae" else torch.randn(n_rows, params.W_dec.shape[1], generator=generator, dtype=torch.float64)
    )
    dead = torch.randperm(d_sae, generator=generator)[:n_dead].sort().values
    make, loss_of = ARCHITECTURES[name]
    at = 99 if name.endswith("at last") else 0
    ours = make(k).outcome(params, Batch(x, target), StepContext(at, 100, dead, coefficient))
    leaves = {key: value.clone().requires_grad_() for key, value in params.named().items()}
    plain = dense.Dense(leaves, x, target, params.subtract_b_dec)
    loss, z = loss_of(plain, k)
    loss = loss + plain.auxk(z, dead, coefficient) + dense.revival_loss(plain, dead, coefficient)
    loss.backward()
    return ours, loss.detach(), leaves, z.detach()


@settings(max_examples=120, deadline=None)
@given(
    name=st.sampled_from(list(ARCHITECTURES)),
    kind=st.sampled_from(KINDS),
    d_in=st.integers(2, 12),
    d_sae=st.integers(1, 40),
    n_rows=st.integers(1, 9),
    k=st.integers(1, 8),
    n_dead=st.integers(0, 20),
    seed=st.integers(0, 2**20),
)
def test_step_equals_dense_autograd(name, kind, d_in, d_sae, n_rows, k, n_dead, seed):
    ours, loss, leaves, z = both(name, d_in, d_sae, n_rows, min(k, d_sae), min(n_dead, d_sae), seed, kind=kind)
    assert_equal(ours, loss, leaves, z)


def test_a_crosscoders_penalty_weighs_by_the_sum_of_norms_at_its_hook_points(monkeypatch):
    crosscoder = (lambda k: Standard(FIXED, (3, 4, 1)), lambda it, k: dense.standard_loss(it, 0.7, (3, 7)))
    monkeypatch.setitem(ARCHITECTURES, "crosscoder", crosscoder)
    assert_equal(*both("crosscoder", d_in=8, d_sae=30, n_rows=7, k=4, n_dead=5, seed=2))


def assert_equal(ours, loss, leaves, z):
    torch.testing.assert_close(ours.loss, loss, rtol=1e-10, atol=1e-12)
    assert int(ours.n_active) == int((z > 0).sum())
    assert ours.n_fired.tolist() == (z > 0).sum(0).tolist()
    for name, gradient in ours.gradients.named().items():
        expected = leaves[name].grad if leaves[name].grad is not None else torch.zeros_like(leaves[name])
        torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-10, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("is_dense", [True, False])
@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_chunks_of_rows_and_both_kinds_of_codes_change_nothing(name, is_dense, monkeypatch):
    monkeypatch.setattr(step, "_CHUNK_BYTES", 512 * 4 * 5)
    monkeypatch.setattr(entries, "DENSE_SHARE", 1 << 40 if is_dense else 1)
    assert_equal(*both(name, d_in=8, d_sae=512, n_rows=12, k=4, n_dead=100, seed=1))


def test_auxk_gives_living_features_no_gradient_of_its_own():
    with_aux, *_ = both("topk", 8, 64, 16, 4, n_dead=10, seed=3)
    without, *_ = both("topk", 8, 64, 16, 4, n_dead=10, seed=3, coefficient=0.0)
    dead = torch.randperm(64, generator=_after_draws(3, 8, 64, 16))[:10]
    living = torch.ones(64, dtype=torch.bool)
    living[dead] = False
    for name in ("W_enc", "W_dec", "b_enc"):
        difference = with_aux.gradients.named()[name] - without.gradients.named()[name]
        assert difference[living].abs().max() == 0, name
        assert difference[dead].abs().max() > 0, name


def _after_draws(seed: int, d_in: int, d_sae: int, n_rows: int) -> torch.Generator:
    generator = torch.Generator().manual_seed(seed)
    random_parameters(d_in, d_sae, generator)
    torch.randn(n_rows, d_in, generator=generator, dtype=torch.float64)
    return generator


def test_auxk_counts_the_decoder_bias_once():
    """Dead features that leave nothing out: ê = 0, so the loss is Σ‖e‖²/Σ‖e - ē‖², whatever b_dec is."""
    generator = torch.Generator().manual_seed(0)
    params = random_parameters(6, 10, generator)
    params.b_enc[:] = -100.0
    x = torch.randn(20, 6, generator=generator, dtype=torch.float64)
    ours = TopK(2).outcome(params, Batch.of(x), StepContext(0, 10, torch.arange(10), 1.0))
    error = x - params.b_dec
    expected = error.square().sum() / x.numel() + error.square().sum() / (error - error.mean(0)).square().sum()
    torch.testing.assert_close(ours.loss, expected)


@pytest.mark.parametrize("name", ["topk", "batchtopk", "matryoshka", "standard", "gated", "jumprelu target"])
def test_bfloat16_encoder_keeps_values_in_full_precision(name):
    """Only what is selected may differ: an entry's value is the float32 pre-activation, so losses agree closely."""
    generator = torch.Generator().manual_seed(0)
    params = random_parameters(16, 64, generator, name=name)
    params = dataclasses.replace(params, **{key: value.float() for key, value in params.named().items()})
    batch = Batch.of(torch.randn(256, 16, generator=generator))
    exact, narrow = (
        ARCHITECTURES[name][0](4).outcome(params, batch, StepContext(0, 10, torch.arange(0), precision=precision))
        for precision in ("float32", "bfloat16")
    )
    assert float(exact.loss) == pytest.approx(float(narrow.loss), rel=2e-3)
    for key, value in exact.gradients.named().items():
        error = torch.linalg.vector_norm(narrow.gradients.named()[key] - value)
        assert error < 0.05 * torch.linalg.vector_norm(value), key
