import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mi_pipe.saes.batchtopk import BatchTopK
from mi_pipe.saes.gradients import Parameters
from mi_pipe.saes.kernels import pre_activations
from mi_pipe.saes.optimisation import Schedule
from mi_pipe.saes.topk import TopK
from mi_pipe.saes.trainer import TrainerSettings, loss_gradients
from tests.saes.dense_reference import batch_topk_mask, dense_loss, topk_mask

SCHEDULE = Schedule(1e-3, 10, 0, 0)
MASKS = {"topk": topk_mask, "batchtopk": batch_topk_mask}


def random_parameters(d_in: int, d_sae: int, generator: torch.Generator) -> Parameters:
    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return Parameters(randn(d_sae, d_in), randn(d_sae, d_in), randn(d_sae) * 0.3, randn(d_in) * 0.3)


def both(architecture: str, d_in: int, d_sae: int, n_rows: int, k: int, n_dead: int, seed: int, coefficient=0.5):
    generator = torch.Generator().manual_seed(seed)
    params = random_parameters(d_in, d_sae, generator)
    x = torch.randn(n_rows, d_in, generator=generator, dtype=torch.float64)
    dead = torch.randperm(d_sae, generator=generator)[:n_dead].sort().values
    selection = TopK(k) if architecture == "topk" else BatchTopK(k, 100)
    settings_ = TrainerSettings(SCHEDULE, dead_window=1, auxk_coefficient=coefficient)
    sparse = loss_gradients(params, x, selection, dead, settings_)
    leaves = {name: value.clone().requires_grad_() for name, value in params.named().items()}
    loss = dense_loss(leaves, x, lambda pre: MASKS[architecture](pre, k), dead, coefficient)
    loss.backward()
    return sparse, loss, leaves


@settings(max_examples=40, deadline=None)
@given(
    architecture=st.sampled_from(["topk", "batchtopk"]),
    d_in=st.integers(2, 12),
    d_sae=st.integers(1, 40),
    n_rows=st.integers(1, 9),
    k=st.integers(1, 8),
    n_dead=st.integers(0, 20),
    seed=st.integers(0, 2**20),
)
def test_sparse_step_equals_dense_autograd(architecture, d_in, d_sae, n_rows, k, n_dead, seed):
    sparse, loss, leaves = both(architecture, d_in, d_sae, n_rows, min(k, d_sae), min(n_dead, d_sae), seed)
    if not torch.isfinite(loss):  # one row has no variance about its own mean: AuxK is then left out
        return
    torch.testing.assert_close(sparse.loss, loss.detach(), rtol=1e-10, atol=1e-12)
    for name, gradient in sparse.parameters.named().items():
        torch.testing.assert_close(gradient, leaves[name].grad, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("architecture", ["topk", "batchtopk"])
def test_sparse_step_equals_dense_autograd_where_the_prefilter_works(architecture):
    sparse, loss, leaves = both(architecture, d_in=8, d_sae=512, n_rows=12, k=4, n_dead=100, seed=1)
    torch.testing.assert_close(sparse.loss, loss.detach())
    for name, gradient in sparse.parameters.named().items():
        torch.testing.assert_close(gradient, leaves[name].grad)


def test_auxk_gives_living_features_no_gradient_of_its_own():
    with_aux, _, _ = both("topk", 8, 64, 16, 4, n_dead=10, seed=3)
    without, _, _ = both("topk", 8, 64, 16, 4, n_dead=10, seed=3, coefficient=0.0)
    dead = torch.randperm(64, generator=_after_draws(3, 8, 64, 16))[:10]
    living = torch.ones(64, dtype=torch.bool)
    living[dead] = False
    for name in ("W_enc", "W_dec", "b_enc"):
        difference = with_aux.parameters.named()[name] - without.parameters.named()[name]
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
    settings_ = TrainerSettings(SCHEDULE, dead_window=1, auxk_coefficient=1.0)
    result = loss_gradients(params, x, TopK(2), torch.arange(10), settings_)
    error = x - params.b_dec
    expected = error.square().sum() / x.numel() + error.square().sum() / (error - error.mean(0)).square().sum()
    torch.testing.assert_close(result.loss, expected)


def test_bfloat16_encoder_keeps_values_in_full_precision():
    generator = torch.Generator().manual_seed(0)
    params = random_parameters(16, 64, generator)
    params = Parameters(**{name: value.float() for name, value in params.named().items()})
    x = torch.randn(32, 16, generator=generator)
    settings_ = TrainerSettings(SCHEDULE, dead_window=1, encoder_precision="bfloat16")
    code = loss_gradients(params, x, TopK(4), torch.arange(0), settings_).code
    exact = pre_activations(x - params.b_dec, params.W_enc, params.b_enc, "float32").relu()
    rows, features = code.entry_rows().long(), code.features.long()
    torch.testing.assert_close(code.values, exact[rows, features], rtol=1e-5, atol=1e-5)
