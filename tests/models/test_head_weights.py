import pytest
import torch

from mi_pipe.core.errors import HookPointError
from mi_pipe.models.head_weights import check_head_weights, head_weights
from mi_pipe.models.hook_points import HookMap
from tests.circuits.tiny import HF_CONFIGS, NATIVE_FIELDS, model


@pytest.mark.parametrize("name", [*HF_CONFIGS, *NATIVE_FIELDS])
def test_weights_are_those_of_the_bridge(name):
    here = model(name)
    layers = [head_weights(here, layer) for layer in range(here.info.n_layers)]
    for part in ("W_Q", "W_K", "W_V", "W_O"):
        torch.testing.assert_close(torch.stack([getattr(w, part) for w in layers]), getattr(here.bridge, part))


@pytest.mark.parametrize("name", ["gpt2", "neox", "llama_gqa", "phi"])
def test_weights_make_what_the_attention_writes(name):
    here = model(name)
    seen = {}
    names = ["ln1.hook_out", "attn.hook_out"]
    hooks = {f"blocks.1.{part}": lambda value, part=part: seen.update({part: value}) for part in names}
    with here.edited(hooks):
        here.logits(torch.tensor([[5]]))
    weights = head_weights(here, 1)
    # One token attends to itself alone, so the output is the OV circuit's.
    value = torch.einsum("m,hmk->hk", seen["ln1.hook_out"][0, 0], weights.W_V)
    value = value if weights.b_V is None else value + weights.b_V
    written = torch.einsum("hk,hkm->m", weights.to_heads(value), weights.W_O)
    written = written if weights.b_O is None else written + weights.b_O
    torch.testing.assert_close(written, seen["attn.hook_out"][0, 0])


def test_a_model_without_projections_is_refused():
    here = model("gpt2")
    check_head_weights(here.hooks, here.info)
    bare = HookMap([site for site in here.hooks if "hook_q" not in site.name])
    with pytest.raises(HookPointError, match="hook_q"):
        check_head_weights(bare, here.info)
