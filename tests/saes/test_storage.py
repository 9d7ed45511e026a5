"""SAEs as files: what is written is read again, of this version and of the first."""

import pytest
import torch

from mi_pipe.saes.inference import InferenceRule
from mi_pipe.saes.sae import SAE
from mi_pipe.saes.sites import Sites
from mi_pipe.saes.storage import make_probe, read_sae, sae_config, sae_tensors

HOOK = "blocks.3.hook_resid_post"


@pytest.fixture
def sae() -> SAE:
    torch.manual_seed(0)
    return SAE(
        torch.randn(6, 20), torch.randn(20), torch.randn(20, 6), torch.randn(6), rule=InferenceRule("topk", 4),
        architecture="topk", name="L3.resid_post.topk.k4.d20.s0", sites=Sites.of_sae(HOOK, 6), model="models/mine",
    ).eval()  # fmt: skip


@pytest.mark.parametrize("of_version_1", [False, True])
def test_an_sae_read_again_gives_the_same_outputs(sae, of_version_1):
    x = torch.randn(10, 6)
    config = sae_config(sae, 0, make_probe(sae, x))
    if of_version_1:
        # Version 1 of the stage knew SAEs of one hook point only.
        for name in ("sites", "kind", "model", "hook_out", "d_out", "training"):
            del config[name]
    found = read_sae(config, sae_tensors(sae))
    torch.testing.assert_close(found(x), sae(x), rtol=0, atol=0)
    assert found.sites == sae.sites
    assert found.model == ("" if of_version_1 else "models/mine")
