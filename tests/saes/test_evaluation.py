import pytest
import torch

from mi_pipe.models.trained import native_module, wrap_native
from mi_pipe.saes.evaluation import evaluate_rows
from mi_pipe.saes.held_out import _mark
from mi_pipe.saes.inference import InferenceRule
from mi_pipe.saes.sae import SAE
from mi_pipe.saes.splice import SpliceFigures, cross_entropy, pad_prompts, zeros
from mi_pipe.saes.step import Batch

HOOK = "blocks.0.hook_resid_post"


@pytest.fixture(scope="module")
def model():
    fields = {
        "n_layers": 1,
        "d_model": 16,
        "n_heads": 2,
        "d_head": 8,
        "n_ctx": 16,
        "d_vocab": 20,
        "attn_only": True,
        "act_fn": "relu",
        "normalization_type": "LN",
        "positional_embedding_type": "rotary",
        "seed": 0,
    }
    module = native_module(fields)
    with torch.no_grad():
        for value in module.parameters():
            value.mul_(5)
    return wrap_native(module)


def identity_sae(d: int) -> SAE:
    """Return an SAE that is exact: each value and its negative have a feature."""
    both = torch.cat([torch.eye(d), -torch.eye(d)])
    return SAE(both.T.contiguous(), torch.zeros(2 * d), both, torch.zeros(d), InferenceRule("topk", k=d))


def test_row_metrics_of_a_worked_example():
    """One feature reads the first of two values and nothing reads the second: 2² + 2² of 2(3² + 2²) is left."""
    sae = SAE(torch.tensor([[1.0, 0], [0, 0]]), torch.tensor([0.0, -1]), torch.eye(2), torch.zeros(2), threshold(0.5))
    x = torch.tensor([[6.0, 2], [0, -2]])
    figures = evaluate_rows(sae, [Batch.of(x[:1]), Batch.of(x[1:])]).figures
    assert figures.n_rows == 2
    assert figures.fvu == pytest.approx(8 / 26)
    assert figures.l0 == 0.5
    assert figures.silent_fraction == 0.5
    assert figures.cosine == pytest.approx(0.5 * 6 / 40**0.5)


def threshold(value: float) -> InferenceRule:
    return InferenceRule("threshold", threshold=torch.tensor(value))


def test_no_rows_cannot_be_evaluated():
    with pytest.raises(ValueError, match="no rows"):
        evaluate_rows(identity_sae(2), [])


def test_an_exact_sae_recovers_all(model):
    prompts = [torch.arange(8), torch.arange(12) % 5]
    batch = pad_prompts(prompts, [torch.ones(len(p), dtype=torch.bool) for p in prompts])
    clean, zero = cross_entropy(model, HOOK, [batch]), cross_entropy(model, HOOK, [batch], zeros)
    spliced = cross_entropy(model, HOOK, [batch], identity_sae(16))
    assert SpliceFigures(clean, spliced, zero).ce_recovered == pytest.approx(1, abs=1e-4)


def test_padding_changes_no_loss(model):
    prompts = [torch.arange(8), torch.arange(12) % 5, torch.tensor([3, 1, 2])]
    marks = [torch.arange(len(p)) % 2 == 0 for p in prompts]
    together = cross_entropy(model, HOOK, [pad_prompts(prompts, marks)], zeros)
    apart = [
        (len(p) - 1, cross_entropy(model, HOOK, [pad_prompts([p], [m])], zeros))
        for p, m in zip(prompts, marks, strict=True)
    ]
    assert together == pytest.approx(sum(n * loss for n, loss in apart) / sum(n for n, _ in apart), rel=1e-5)


def test_only_marked_positions_are_replaced(model):
    batch = pad_prompts([torch.arange(6)], [torch.tensor([False, True, False, False, True, False])])
    seen = []

    def replacement(x):
        seen.append(x)
        return x

    plain = cross_entropy(model, HOOK, [batch])
    assert cross_entropy(model, HOOK, [batch], replacement) == pytest.approx(plain)
    with model.edited({HOOK: lambda value: seen.append(value[0, [1, 4]])}):
        model.logits(batch.tokens)
    torch.testing.assert_close(seen[0], seen[1])


def test_hook_points_that_only_the_bridge_has_are_spliced_too(model):
    name = next(site.name for site in model.hooks if site.module_path is None and site.width == 16)
    batch = pad_prompts([torch.arange(6)], [torch.ones(6, dtype=torch.bool)])
    logits = model.bridge.run_with_hooks(batch.tokens, fwd_hooks=[(name, lambda value, hook: torch.zeros_like(value))])
    expected = torch.nn.functional.cross_entropy(logits[0, :-1], batch.tokens[0, 1:])
    assert cross_entropy(model, name, [batch], zeros) == pytest.approx(float(expected), rel=1e-5)
    assert cross_entropy(model, name, [batch], zeros) != pytest.approx(cross_entropy(model, name, [batch]), rel=1e-3)


def test_bos_is_never_marked():
    import numpy as np

    tokens = torch.tensor([7, 3, 7, 4])
    everywhere = np.arange(4)
    assert _mark(tokens, everywhere, bos_id=7).tolist() == [False, True, True, True]
    assert _mark(tokens, everywhere, bos_id=None).tolist() == [True] * 4
    assert _mark(tokens, everywhere[1:3], bos_id=7).tolist() == [False, True, True, False]
