import torch

from mi_pipe.patching.block_calls import BlockCalls
from mi_pipe.patching.readout import token_logits


def test_restarting_at_any_block_gives_the_models_own_logits(model):
    tokens = torch.randint(3, 97, (3, 9), generator=torch.Generator().manual_seed(1))
    choices = torch.tensor([[5, 6], [7, 8], [9, 90]])
    residuals = {}
    reads = {
        f"blocks.{layer}.hook_resid_pre": lambda v, n=layer: residuals.__setitem__(n, v.clone())
        for layer in range(model.info.n_layers)
    }
    with model.edited(reads):
        wanted = model.logits(tokens)[:, -1].gather(-1, choices)
    calls = BlockCalls(model, tokens)
    for layer in range(model.info.n_layers):
        found = token_logits(model, calls.run(residuals[layer], layer), choices)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
