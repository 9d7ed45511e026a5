import torch

from mi_pipe.models.fused import fused_attention
from mi_pipe.models.trained import native_module
from tests.models.tiny import TOY_FIELDS


def _logits_and_gradients(module, tokens):
    module.zero_grad()
    logits = module(tokens)
    logits.square().mean().backward()
    return logits.detach(), [parameter.grad.clone() for parameter in module.parameters()]


def test_fused_attention_gives_the_logits_and_gradients_of_the_written_out_one():
    module = native_module(TOY_FIELDS)
    tokens = torch.randint(0, 64, (3, 17), generator=torch.Generator().manual_seed(0))
    plain = _logits_and_gradients(module, tokens)
    with fused_attention(module):
        fused = _logits_and_gradients(module, tokens)
    torch.testing.assert_close(fused[0], plain[0], atol=1e-5, rtol=1e-5)
    for one, other in zip(fused[1], plain[1], strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


def test_attention_is_written_out_again_afterwards_and_soft_capped_attention_never_fused():
    module = native_module(TOY_FIELDS)
    tokens = torch.zeros(1, 4, dtype=torch.int64)
    before = module(tokens)
    with fused_attention(module):
        assert "forward" in vars(module.layers[0].attn)
    assert "forward" not in vars(module.layers[0].attn)
    assert torch.equal(module(tokens), before)
    capped = native_module({**TOY_FIELDS, "attn_scores_soft_cap": 5.0})
    with fused_attention(capped):
        assert "forward" not in vars(capped.layers[0].attn)
