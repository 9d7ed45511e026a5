import torch

from mi_pipe.saes.metrics import Moments, StreamingFVU


def test_fvu_of_a_worked_example():
    """x = 1..5 about 3: 10; errors 1, 0, 0, 0, 2: 5."""
    x = torch.tensor([[1.0], [2.0], [3.0], [4.0], [5.0]])
    reconstruction = torch.tensor([[2.0], [2.0], [3.0], [4.0], [3.0]])
    fvu = StreamingFVU(1, torch.device("cpu"))
    fvu.update(x, reconstruction)
    assert fvu.value() == 0.5


def test_streaming_fvu_equals_whole_array_fvu():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(100, 7, generator=generator) * torch.arange(1, 8) + 5
    reconstruction = x + 0.3 * torch.randn(100, 7, generator=generator)
    fvu = StreamingFVU(7, torch.device("cpu"))
    for part in torch.arange(100).split(13):
        fvu.update(x[part], reconstruction[part])
    x, reconstruction = x.double(), reconstruction.double()
    whole = (x - reconstruction).square().sum() / (x - x.mean(0)).square().sum()
    assert abs(fvu.value() - float(whole)) < 1e-12


def test_fvu_is_taken_about_the_mean_and_not_about_zero():
    x = torch.randn(200, 3, generator=torch.Generator().manual_seed(0)) + 100
    fvu = StreamingFVU(3, torch.device("cpu"))
    fvu.update(x, x.mean(0).expand_as(x))
    assert abs(fvu.value() - 1) < 1e-6


def test_moments_of_batches_equal_moments_of_all():
    x = torch.randn(50, 4, generator=torch.Generator().manual_seed(0)).double()
    moments = Moments(4, torch.device("cpu"))
    for part in x.split(7):
        moments.update(part)
    torch.testing.assert_close(moments.centred_square(), (x - x.mean(0)).square().sum())
