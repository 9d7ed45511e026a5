import numpy as np
import pytest
import torch

from mi_pipe.heads.inhibition import InhibitionPrompts, attention_losses
from tests.circuits.tiny import model, pairs

PAIRS = pairs()
IO = torch.tensor([1, 2, 0])


@pytest.mark.parametrize("name", ["gpt2", "llama_gqa", "native_attn_only"])
def test_losses_are_those_of_exchanging_one_head_by_hand(name):
    here, n_heads = model(name), model(name).info.n_heads
    found = attention_losses(
        here, InhibitionPrompts(PAIRS.clean, PAIRS.corrupted, IO), [(0, 2), (1, 0)], [(1, 1), (1, 3)]
    )
    bridge, z_name, pattern_name = here.bridge, "blocks.0.attn.hook_z", "blocks.1.attn.hook_pattern"
    _, corrupted = bridge.run_with_cache(PAIRS.corrupted)
    _, clean = bridge.run_with_cache(PAIRS.clean)
    donor = corrupted[z_name].reshape(3, 6, n_heads, -1)

    def exchange(value, hook):
        shape = value.shape
        value = value.reshape(3, 6, n_heads, -1).clone()
        value[:, -1, 2] = donor[:, -1, 2]
        return value.reshape(shape)

    seen = {}
    bridge.run_with_hooks(
        PAIRS.clean, fwd_hooks=[(z_name, exchange), (pattern_name, lambda value, hook: seen.update(pattern=value))]
    )
    lost = (clean[pattern_name] - seen["pattern"])[torch.arange(3), :, -1, IO][:, [1, 3]].mean(1)
    np.testing.assert_allclose(found[0], lost.detach().numpy(), atol=1e-6)
    assert np.abs(found[0]).max() > 1e-4
    assert np.isnan(found[1]).all(), "no receiver is in a later layer"


def test_a_prompt_exchanged_for_itself_loses_nothing():
    found = attention_losses(model("gpt2"), InhibitionPrompts(PAIRS.clean, PAIRS.clean, IO), [(0, 0)], [(1, 1)])
    np.testing.assert_allclose(found, 0, atol=1e-7)
