"""Hook points are listed from a config alone; what is listed small is described in full."""

import pytest
from transformers import GPT2Config, GPTNeoXConfig, LlamaConfig

from mi_pipe.models.loading import hooks_of_config
from mi_pipe.models.reading import Columns

CONFIGS = {
    "GPT2LMHeadModel": GPT2Config(n_layer=5, n_embd=32, n_head=4, vocab_size=5003),
    "GPTNeoXForCausalLM": GPTNeoXConfig(
        num_hidden_layers=5, hidden_size=32, num_attention_heads=4, intermediate_size=64, vocab_size=5003
    ),
    "LlamaForCausalLM": LlamaConfig(
        num_hidden_layers=5,
        hidden_size=32,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        vocab_size=5003,
    ),
}


@pytest.fixture(params=[*CONFIGS])
def listed(request):
    CONFIGS[request.param].architectures = [request.param]
    return hooks_of_config(CONFIGS[request.param], request.param)


def test_every_layer_and_the_whole_vocabulary_are_there(listed):
    hooks, info = listed
    assert (info.n_layers, info.d_vocab, hooks["unembed.hook_out"].shape) == (5, 5003, (5003,))
    kinds = {site.name.removeprefix("blocks.0.") for site in hooks if site.layer == 0}
    for layer in range(5):
        assert {site.name.removeprefix(f"blocks.{layer}.") for site in hooks if site.layer == layer} == kinds
        for kind in kinds:
            first, site = hooks[f"blocks.0.{kind}"], hooks[f"blocks.{layer}.{kind}"]
            assert site.shape == first.shape
            if first.reading is not None:
                assert site.reading.module_path == first.reading.module_path.replace(".0", f".{layer}", 1)
    assert "blocks.5.hook_resid_post" not in hooks


def test_modules_of_every_layer_are_there(listed):
    hooks, _ = listed
    path = hooks["blocks.4.hook_mlp_out"].module_path
    assert hooks.matching(path.replace(".4.", ".*.")) == [path.replace(".4.", f".{layer}.") for layer in range(5)]


def test_the_parts_of_a_fused_projection_are_its_columns_each_once(listed):
    hooks, info = listed
    rules = [hooks[f"blocks.3.attn.hook_{part}"].reading.rule for part in "qkv"]
    if info.architecture == "LlamaForCausalLM":
        assert rules == [None] * 3, "its projections are apart"
    else:
        assert all(isinstance(rule, Columns) for rule in rules)
        assert sorted(index for rule in rules for index in rule.indices) == list(range(3 * info.d_model))
